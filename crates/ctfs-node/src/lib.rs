//! One CTFS server: everything wired together, and the tasks that keep it in order.
//!
//! [`Node::start`] opens the state directory, the network, the replicated metadata, the chunk
//! store, the cache tier and the mount, in that order, and [`Node::shutdown`] closes them in the
//! reverse one. Reading order: [`node`] (a server's life), [`join`] (how it becomes a member),
//! [`services`] (what peers ask), [`events`] (what applying the log sets in motion), then the
//! tasks: [`members`], [`repair`], [`collect`]; [`answers`] is what people ask.

mod access;
pub mod admin;
mod answers;
mod collect;
mod events;
#[cfg(test)]
mod golden;
mod interfaces;
mod join;
mod life;
mod members;
mod messages;
mod names;
mod node;
mod pairs;
mod peers;
pub mod problem;
mod quotas;
mod repair;
mod report;
mod roundtrip;
mod services;
mod settings;
mod state;
mod stop;
mod verdict;
mod voters;

pub use node::Node;
pub use settings::NodeSettings;
pub use state::is_member;

/// Longest round trip between servers that elections can be set for.
pub const RTT_MAX: std::time::Duration = ctfs_consensus::Timings::RTT_MAX;
