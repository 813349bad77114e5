//! Random histories of several servers, against a naive file system.
//!
//! Two profiles. In [`run`] nothing fails: every answer and the whole tree must be the reference's,
//! whichever server is asked. In [`unlucky`] commands and puts fail, half of them after they
//! happened: what was answered must stay, and what failed may be there or not, once and for all.
//!
//! `PROPTEST_CASES` asks for more cases than the default few seconds hold.

mod check;
mod race;
mod reference;
mod run;
mod steps;
mod unlucky;

use proptest::{prelude::*, test_runner::Config};

/// Few enough for every run of all tests.
fn cases(default: u32) -> Config {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(default);
    Config { cases, max_shrink_iters: 4000, failure_persistence: None, ..Config::default() }
}

fn block_on<T>(task: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(task)
}

proptest! {
    #![proptest_config(cases(300))]
    #[test]
    fn several_servers_are_one_file_system(setup in steps::setup(), history in steps::history(80)) {
        block_on(run::run(setup, &history.0))?;
    }
}

proptest! {
    #![proptest_config(cases(300))]
    #[test]
    fn what_was_answered_stays_and_what_failed_happens_once_or_never(
        setup in steps::setup(),
        history in unlucky::history(60),
    ) {
        block_on(unlucky::run(setup, &history.0))?;
    }
}
