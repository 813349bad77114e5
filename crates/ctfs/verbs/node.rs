//! `ctfs node remove`: a server that does not come back.

use std::io::{BufRead, IsTerminal};

use clap::{Args, Subcommand};
use ctfs_node::{
    admin::{Request, Response},
    problem::{Code, Problem, exit},
};

use crate::{Context, errors::Outcome};

/// The daemon waits a minute for copies, then says how many are left.
const COPYING: std::time::Duration = std::time::Duration::from_secs(100);

/// Change the list of servers
#[derive(Debug, Args)]
pub struct Node {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Remove a server for good: its key is never accepted again
    ///
    /// First its chunks are copied to the others, from wherever they still are; while some are
    /// not, it is refused. A server whose disk is lost is removed the same way. To come back it joins as a new server, with an empty state directory.
    Remove {
        /// Name, as `ctfs nodes` shows it
        name: String,

        /// Do not ask
        #[arg(long)]
        yes: bool,

        /// Remove it although it may hold the last copy of something
        #[arg(long)]
        force: bool,
    },
}

impl Node {
    pub fn run(self, context: &Context) -> Outcome {
        let Verb::Remove { name, yes, force } = self.verb;
        if !yes {
            let question = format!("remove {name} from the cluster for good?");
            somebody_is_there(&question)?;
            // Nobody answers a question about a server that is not there.
            let Response::Nodes(nodes) = super::ask(context, &Request::Nodes, super::LOOK)? else {
                return Err(super::unexpected());
            };
            if !nodes.servers.iter().any(|server| server.name == name) {
                return Err(Problem::no_such_server(&name));
            }
            confirm(context, &question)?;
        }
        let done = super::ask_to(context, &Request::NodeRemove { name, force }, COPYING)?;
        super::say_done(context, &done);
        Ok(exit::OK)
    }
}

/// Where there is no terminal, fails and names the flag.
fn somebody_is_there(question: &str) -> Result<(), Problem> {
    if std::io::stdin().is_terminal() {
        return Ok(());
    }
    Err(Problem::new(Code::NeedsAnswer, question).why("nobody sits at the terminal to answer").try_next("add --yes"))
}

fn confirm(context: &Context, question: &str) -> Result<(), Problem> {
    context.ui.talk(&format!("{question} [y/N] "));
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(|error| Problem::io("read the answer", &error))?;
    if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { Err(Problem::new(Code::NeedsAnswer, "nothing was done")) }
}
