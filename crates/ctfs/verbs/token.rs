//! `ctfs token`: the line for the next server.

use std::time::{Duration, SystemTime};

use clap::Args;
use ctfs_node::{
    admin::{Request, Response},
    problem::exit,
};
use serde::Serialize;

use crate::{Context, choices, errors::Outcome, ui::counted};

/// Print the line that lets the next server join
///
/// The line is the only thing on stdout, so that it can be piped. Whoever has it can join until it expires or is used up.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  ctfs token                   one server, within an hour\n  ctfs token --uses 2 --ttl 1d\n  ctfs token | ssh node2 ctfs up /srv/data --join -")]
pub struct Token {
    /// How long it is valid
    #[arg(long, value_name = "TIME", value_parser = valid_for, default_value = "1h")]
    ttl: Duration,

    /// How many servers may join with it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000), default_value_t = 1)]
    uses: u32,

    /// For machines
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Printed {
    line: String,
    token: String,
    /// RFC 3339.
    expires: String,
    uses: u32,
}

/// A month: a forgotten token must not stay good for ever.
const TTL_MAX: Duration = Duration::from_secs(31 * 24 * 3600);

fn valid_for(text: &str) -> Result<Duration, String> {
    match choices::duration(text)? {
        ttl if ttl < Duration::from_secs(1) => Err("a token is valid for at least 1s".into()),
        ttl if ttl > TTL_MAX => Err("a token is valid for at most 31 days".into()),
        ttl => Ok(ttl),
    }
}

impl Token {
    pub fn run(self, context: &Context) -> Outcome {
        let request = Request::Token { ttl_secs: self.ttl.as_secs(), uses: self.uses };
        let Response::Token(token) = super::ask(context, &request, super::CHANGE)? else {
            return Err(super::unexpected());
        };
        let expires = humantime::format_rfc3339_seconds(SystemTime::from(token.expires)).to_string();
        if self.json {
            context.ui.json(&Printed { line: token.line, token: token.token, expires, uses: token.uses })?;
        } else {
            context.ui.print(&format!("{}\n", token.line));
            context.ui.talk(&format!("  valid until {expires}, {}\n", counted(token.uses.into(), "use")));
        }
        Ok(exit::OK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_neither_dead_on_arrival_nor_eternal() {
        assert_eq!(valid_for("1h"), Ok(Duration::from_secs(3600)));
        for bad in ["0s", "1y", "soon"] {
            assert!(valid_for(bad).is_err(), "{bad}");
        }
    }
}
