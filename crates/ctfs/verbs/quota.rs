//! `ctfs quota`: limits on what is below a directory.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use ctfs_node::{
    admin::{Limit, QuotaReport, QuotasReport, Request, Response},
    problem::exit,
};
use ctfs_types::ByteSize;

use crate::{
    Context, choices,
    errors::Outcome,
    ui::{percent, table},
};

/// Limits on what is below a directory
#[derive(Debug, Args)]
pub struct Quota {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Limit what may be below a directory
    ///
    /// A limit that is not named stays as it is, `none` lifts it. It may be below what is there: then only what makes
    /// less of it goes. Nothing is moved or hard-linked across the edge of such a directory;
    /// programs get EXDEV and copy.
    #[command(group(clap::ArgGroup::new("what").required(true).multiple(true)), after_help = "Examples:\n  ctfs quota set /srv/data/home/alice --bytes 50GiB\n  ctfs quota set /srv/data/mail --bytes 1TiB --files 10000000")]
    Set {
        path: PathBuf,

        /// Most bytes: what files have allocated, as du counts it, each byte once however many copies are kept
        #[arg(long, value_name = "SIZE", group = "what", value_parser = bytes_limit)]
        bytes: Option<Limit>,

        /// Most files and directories, of any type, the directory itself not counted
        #[arg(long, value_name = "N", group = "what", value_parser = files_limit)]
        files: Option<Limit>,
    },
    /// Lift both limits of a directory
    Clear { path: PathBuf },
    /// List quotas and what is used of them
    List {
        /// Only those on, above and below this path
        path: Option<PathBuf>,

        /// For machines
        #[arg(long)]
        json: bool,
    },
}

impl Quota {
    pub fn run(self, context: &Context) -> Outcome {
        let (request, json) = match self.verb {
            Verb::Set { path, bytes, files } => {
                (Request::QuotaSet { path: super::named(&path), bytes, files }, false)
            }
            Verb::Clear { path } => (Request::QuotaClear { path: super::named(&path) }, false),
            Verb::List { path, json } => (Request::QuotaList { path: path.as_deref().map(super::named) }, json),
        };
        match super::ask(context, &request, super::CHANGE)? {
            Response::Quotas(report) if json => context.ui.json(&report)?,
            Response::Quotas(report) => context.ui.print(&render(&report)),
            _ => return Err(super::unexpected()),
        }
        Ok(exit::OK)
    }
}

fn bytes_limit(text: &str) -> Result<Limit, String> {
    let size = || text.parse().map(|ByteSize(most)| Limit::Most(most)).map_err(|error| format!("{error}, or none"));
    if text == "none" { Ok(Limit::None) } else { size() }
}

fn files_limit(text: &str) -> Result<Limit, String> {
    let number = || choices::count(text).map(Limit::Most).map_err(|error| format!("{error}, or none"));
    if text == "none" { Ok(Limit::None) } else { number() }
}

fn render(report: &QuotasReport) -> String {
    if report.quotas.is_empty() {
        return "no quota\n".into();
    }
    let row = |quota: &QuotaReport| vec![quota.path.to_string(), bytes(quota), files(quota)];
    let mut text = table(&["directory", "bytes", "files"], report.quotas.iter().map(row).collect());
    if report.more > 0 {
        text += &format!("and {} more\n", report.more);
    }
    text
}

pub fn bytes(quota: &QuotaReport) -> String {
    match quota.bytes_limit {
        Some(limit) => format!("{} / {limit}  {} %", quota.bytes_used, percent(quota.bytes_used.0, limit.0)),
        None => format!("{} / any", quota.bytes_used),
    }
}

pub fn files(quota: &QuotaReport) -> String {
    match quota.files_limit {
        Some(limit) => format!("{} / {limit}  {} %", quota.files_used, percent(quota.files_used, limit)),
        None => format!("{} / any", quota.files_used),
    }
}

#[cfg(test)]
mod tests {
    use ctfs_node::admin::WirePath;

    use super::*;

    #[test]
    fn a_quota_is_shown_with_what_is_used_of_it() {
        let quota = QuotaReport {
            path: WirePath("/srv/data/home".into()),
            bytes_limit: Some(ByteSize(4 << 30)),
            bytes_used: ByteSize(1 << 30),
            files_limit: None,
            files_used: 7,
        };
        let report = QuotasReport { quotas: vec![quota], more: 0 };
        assert_eq!(render(&report), " directory       bytes                    files\n /srv/data/home  1.0 GiB / 4.0 GiB  25 %  7 / any\n");
        assert_eq!(render(&QuotasReport { quotas: vec![], more: 0 }), "no quota\n");
        let over = QuotaReport { path: WirePath("/d".into()), bytes_limit: Some(ByteSize(0)), bytes_used: ByteSize(512), files_limit: Some(0), files_used: 0 };
        assert_eq!((bytes(&over), files(&over)), ("512 B / 0 B  100 %".into(), "0 / 0  0 %".into()));
    }
}
