//! States of the metadata that shall have all that was done: 8.

use ctfs_types::Ino;

use super::{ahead::held, claim, node, verdict, with_holders};
use crate::sim::Sim;

/// A makes a file in a directory that it holds, writes and syncs it; then B wants a state that has all of that.
pub fn a_state_without_finished_work(seed: u64) -> Result<(), String> {
    let mut sim = with_holders(seed, 3);
    let (worker, other) = (node(1), node(2));
    let dir = held(&mut sim, worker, "d");
    sim.ask(worker, move |server| async move {
        let file = server.make(dir, "f", 0o600).await.expect("it holds the directory").ino;
        server.write(file, libc::O_RDWR, vec![7; 100_000], true).await.expect("nothing is wrong");
    });
    // As the metadata have it, whoever holds what.
    let size = |sim: &mut Sim, number| {
        sim.ask(node(number), move |server| async move {
            let replica = server.replica().read();
            let name = ctfs_types::FileName::new(b"f").expect("it is a name");
            let file: Option<Ino> = replica.lookup(dir, &name).expect("the store works");
            file.and_then(|file| replica.attr(file).expect("the store works")).map(|attr| attr.size)
        })
    };
    let index = sim.ask(other, |server| async move { server.vfs.settle_everywhere().await });
    claim(index.is_ok(), format!("nobody settles: {index:?}"))?;
    let there = size(&mut sim, other.0);
    claim(there == Some(100_000), format!("the metadata show a size of {there:?} after all was settled, of 100,000 that were synced before"))?;
    verdict(&sim)
}
