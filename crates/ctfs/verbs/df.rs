//! `ctfs df`: how much there is, how much still fits.

use std::path::PathBuf;

use clap::Args;
use ctfs_node::{
    admin::{DfReport, DfServer, Request, Response},
    problem::exit,
};

use crate::{
    Context,
    errors::Outcome,
    verbs::quota,
    ui::{counted, filled, percent, table},
};

/// How much there is and how much still fits
///
/// What fits is what programs can still write, with the copies of each chunk counted in.
#[derive(Debug, Args)]
pub struct Df {
    /// Count what is below this path only
    path: Option<PathBuf>,

    /// For machines
    #[arg(long)]
    json: bool,
}

impl Df {
    pub fn run(self, context: &Context) -> Outcome {
        let request = Request::Df { path: self.path.as_deref().map(super::named) };
        let Response::Df(report) = super::ask(context, &request, super::CHANGE)? else {
            return Err(super::unexpected());
        };
        if self.json {
            context.ui.json(&report)?;
        } else {
            context.ui.print(&render(&report));
        }
        Ok(exit::OK)
    }
}

fn render(report: &DfReport) -> String {
    let place = report.path.as_ref().map_or("all".into(), ToString::to_string);
    let mut text = format!("{place}: {}, {}\n", counted(report.files, "file"), report.bytes);
    let used = report.total.0.saturating_sub(report.available.0);
    let copies = match report.copies {
        1 => "1 copy".into(),
        copies => format!("{copies} copies"),
    };
    text += &format!("{} of {} still fit at {copies} of each chunk ({} % used)\n\n", report.available, report.total, percent(used, report.total.0));
    for quota in &report.quotas {
        text += &format!("quota of {}: {} bytes, {} files\n", quota.path, quota::bytes(quota), quota::files(quota));
    }
    if !report.quotas.is_empty() {
        text += "\n";
    }
    let row = |server: &DfServer| {
        vec![server.name.clone(), filled(server.store_used, server.store_capacity), filled(server.cache_used, server.cache_limit)]
    };
    text + &table(&["node", "cold", "cache"], report.servers.iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use ctfs_types::ByteSize;

    use super::*;

    #[test]
    fn df_says_what_still_fits_with_the_copies_counted_in() {
        const GIB: u64 = 1 << 30;
        let server = DfServer {
            name: "node1".into(),
            store_used: Some(ByteSize(25 * GIB)),
            store_capacity: Some(ByteSize(100 * GIB)),
            cache_used: None,
            cache_limit: None,
        };
        let report = DfReport {
            path: None,
            files: 2,
            bytes: ByteSize(20 * GIB),
            available: ByteSize(75 * GIB),
            total: ByteSize(100 * GIB),
            copies: 1,
            quotas: vec![],
            servers: vec![server],
        };
        assert_eq!(
            render(&report),
            "all: 2 files, 20.0 GiB\n75.0 GiB of 100.0 GiB still fit at 1 copy of each chunk (25 % used)\n\n node   cold                        cache\n node1  25.0 GiB / 100.0 GiB  25 %  -\n"
        );
    }
}
