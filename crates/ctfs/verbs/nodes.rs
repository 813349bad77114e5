//! `ctfs nodes`: who is in the cluster.

use clap::Args;
use ctfs_node::{
    admin::{NodesReport, Request, Response, ServerReport},
    problem::exit,
};

use crate::{Context, errors::Outcome, ui::table};

/// List the servers
#[derive(Debug, Args)]
pub struct Nodes {
    /// For machines
    #[arg(long)]
    json: bool,
}

impl Nodes {
    pub fn run(self, context: &Context) -> Outcome {
        let Response::Nodes(report) = super::ask(context, &Request::Nodes, super::LOOK)? else {
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

fn render(report: &NodesReport) -> String {
    let row = |server: &ServerReport| {
        vec![
            super::status::marked(&server.name, &report.this_node),
            server.node.clone(),
            server.zone.clone(),
            super::status::standing(server).to_owned(),
            server.addresses.join(", "),
            server.last_heard_secs.map_or("never".into(), |secs| match secs {
                0 => "now".into(),
                secs => format!("{} ago", humantime::format_duration(std::time::Duration::from_secs(secs))),
            }),
            server.version.clone(),
        ]
    };
    table(&["node", "id", "zone", "state", "addresses", "heard", "version"], report.servers.iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_server_has_a_line() {
        let status = crate::verbs::status::tests::report();
        let text = render(&NodesReport { this_node: status.this_node, servers: status.servers });
        assert_eq!(text.lines().count(), 4);
        assert!(text.contains("node1*") && text.contains("4m 12s ago"), "{text}");
    }
}
