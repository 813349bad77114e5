//! Stores through mappings, which come when the kernel likes: 3.

use ctfs_types::Ino;
use ctfs_vfs::{Caller, HandleId};

use super::{claim, node, seconds, through_the_log, verdict};
use crate::{server::Server, sim::Sim};

const PAGE: usize = 4096;

/// Has a program write the page of a file, sync it and close the file.
fn write_page(sim: &mut Sim, number: u64, file: Ino, page: usize, byte: u8) {
    sim.ask(node(number), move |server| async move {
        let handle = server.vfs.open(Caller::ROOT, file, libc::O_RDWR).await.expect("nothing is wrong").handle;
        server.write_with(file, handle, (page * PAGE) as u64, vec![byte; PAGE], true).await.expect("nothing is wrong");
        server.vfs.flush(file, handle, 0).await.expect("nothing is wrong");
        server.vfs.release(handle).await;
    });
}

/// The kernel writes a page of a mapping back, and msync(2) waits for it.
async fn write_back(server: &Server, file: Ino, handle: HandleId, byte: u8) -> Result<(), ctfs_vfs::FsError> {
    server.vfs.write(Caller::ROOT, file, handle, 0, vec![byte; PAGE].into(), false, true).await?;
    server.vfs.fsync(file, handle).await
}

/// A program maps a file and closes it; the mapping lives on, and its stores come when another server has the file.
pub fn stores_after_the_file_went(seed: u64) -> Result<(), String> {
    let mut sim = through_the_log(seed, 3);
    let (file, handle) = sim.ask(node(1), |server| async move {
        let file = server.make(Ino::ROOT, "f", 0o600).await.expect("nothing is wrong").ino;
        let handle = server.vfs.open(Caller::ROOT, file, libc::O_RDWR).await.expect("nothing is wrong").handle;
        server.write_with(file, handle, 0, vec![b'a'; 2 * PAGE], true).await.expect("nothing is wrong");
        // close(2); the mapping keeps the handle from its end.
        server.vfs.flush(file, handle, 0).await.expect("nothing is wrong");
        (file, handle)
    });
    write_page(&mut sim, 2, file, 1, b'b');
    // What two servers wrote stays shared for a while; then the other takes it for itself.
    sim.run_for(seconds(12));
    write_page(&mut sim, 2, file, 1, b'c');
    let stored = sim.ask(node(1), move |server| async move { write_back(&server, file, handle, b'd').await });
    claim(stored.is_ok(), format!("a store was refused: {stored:?}"))?;
    for number in 1..=3 {
        let seen = sim.ask(node(number), move |server| async move { server.read(file, crate::programs::Care::Unsynced).await.expect("nothing is wrong") });
        let wanted = [vec![b'd'; PAGE], vec![b'c'; PAGE]].concat();
        claim(seen == wanted, format!("s{number} shows {:?} and {:?} after a store of 'd' and a write of 'c' were synced", seen.first(), seen.get(PAGE)))?;
    }
    verdict(&sim)
}
