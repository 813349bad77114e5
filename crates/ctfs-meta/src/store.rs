//! The ordered key-value store under the namespace.

use std::{
    cell::Cell,
    collections::BTreeMap,
    ops::ControlFlow,
    ptr,
    sync::{PoisonError, RwLock, RwLockReadGuard},
};

/// What a store must do for the namespace. Implemented in memory for tests, simulation and
/// overlays, and over sled by `ctfs-consensus`.
pub trait Store: Send + Sync {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;

    /// Visits the records with `from <= key < to` in key order until `visit` breaks. `visit` asks the store
    /// nothing: it may be locked, and a writer that waits for the lock keeps further readers out.
    fn range(
        &self,
        from: &[u8],
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), StoreError>;

    /// Writes the whole batch or nothing, also when the process dies inside. There is one writer at a time.
    fn write(&self, batch: Batch) -> Result<(), StoreError>;
}

/// Writes in key order; `None` deletes.
pub type Batch = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// A record over another: what it is now, or that it is gone.
pub type Over<'a> = (&'a [u8], Option<&'a [u8]>);

/// Visits what `under` visits with the records `over` it in their places, in key order, until
/// `visit` breaks. Both are in key order and of the same range.
pub fn merged<'a>(
    over: impl Iterator<Item = Over<'a>>,
    under: impl FnOnce(&mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>) -> Result<(), StoreError>,
    visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
) -> Result<(), StoreError> {
    let mut over = over.peekable();
    let mut ended = false;
    under(&mut |key, value| {
        let flow = (|| {
            while let Some((key, value)) = over.next_if(|(over, _)| *over < key) {
                value.map_or(ControlFlow::Continue(()), |value| visit(key, value))?;
            }
            match over.next_if(|(over, _)| *over == key) {
                Some((_, None)) => ControlFlow::Continue(()),
                Some((_, Some(value))) => visit(key, value),
                None => visit(key, value),
            }
        })();
        ended = flow.is_break();
        flow
    })?;
    if ended {
        return Ok(());
    }
    for (key, value) in over {
        if value.is_some_and(|value| visit(key, value).is_break()) {
            break;
        }
    }
    Ok(())
}

/// The store is unusable: not a verdict, the server must stop and rebuild it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    #[error("metadata store: {0}")]
    Io(String),
    #[error("metadata record damaged under key {key:02x?}: {why}")]
    Corrupt { key: Vec<u8>, why: String },
}

thread_local! {
    /// The store in memory that this thread is visiting.
    static VISITED: Cell<*const MemoryStore> = const { Cell::new(ptr::null()) };
}

/// The store in memory. It holds its callers to the rule of [`Store::range`].
#[derive(Debug, Default)]
pub struct MemoryStore {
    records: RwLock<BTreeMap<Vec<u8>, Vec<u8>>>,
}

impl MemoryStore {
    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<Vec<u8>, Vec<u8>>> {
        self.records.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for MemoryStore {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        assert!(!ptr::eq(VISITED.get(), self), "a visit of records asked the store for another one");
        Ok(self.read().get(key).cloned())
    }

    fn range(
        &self,
        from: &[u8],
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), StoreError> {
        if from >= to {
            return Ok(());
        }
        let before = VISITED.replace(self);
        assert!(!ptr::eq(before, self), "a visit of records began another one");
        for (key, value) in self.read().range(from.to_vec()..to.to_vec()) {
            if visit(key, value).is_break() {
                break;
            }
        }
        VISITED.set(before);
        Ok(())
    }

    fn write(&self, batch: Batch) -> Result<(), StoreError> {
        let mut records = self.records.write().unwrap_or_else(PoisonError::into_inner);
        for (key, value) in batch {
            match value {
                Some(value) => records.insert(key, value),
                None => records.remove(&key),
            };
        }
        Ok(())
    }
}
