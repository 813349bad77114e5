//! Equal logs make equal replicas.

use std::collections::BTreeMap;

use ctfs_types::{LogIndex, NodeId};

/// What is wrong: two servers that applied the same entries and hold other records.
pub fn check<H: PartialEq + std::fmt::Debug>(states: &BTreeMap<NodeId, (LogIndex, H)>) -> Option<String> {
    let mut by_index: BTreeMap<LogIndex, (NodeId, &H)> = BTreeMap::new();
    for (node, (index, hash)) in states {
        match by_index.get(index) {
            Some((other, same)) if *same != hash => {
                return Some(format!("s{} and s{} applied {index} and differ", other.0, node.0));
            }
            _ => {
                by_index.insert(*index, (*node, hash));
            }
        }
    }
    None
}
