//! Records of the store, and of the layer ahead of the log on top of them.

use std::{collections::BTreeMap, ops::ControlFlow};

use super::Totals;
use crate::{Store, StoreError, store::merged};

/// The records as a reader sees them: those of the store, unless there are newer ones ahead of the log.
#[derive(Clone, Copy)]
pub struct View<'a> {
    store: &'a dyn Store,
    ahead: Option<&'a BTreeMap<Vec<u8>, Written>>,
    added: Option<&'a BTreeMap<Vec<u8>, Totals>>,
}

/// What a command ahead of the log made of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// `None`: the record is gone.
    pub value: Option<Vec<u8>>,
    /// The command that wrote it last, counted from the first one ahead.
    pub by: u64,
}

impl<'a> View<'a> {
    /// What the log says.
    pub fn committed(store: &'a dyn Store) -> Self {
        Self { store, ahead: None, added: None }
    }

    pub fn ahead(store: &'a dyn Store, ahead: &'a BTreeMap<Vec<u8>, Written>, added: &'a BTreeMap<Vec<u8>, Totals>) -> Self {
        Self { store, ahead: (!ahead.is_empty()).then_some(ahead), added: Some(added) }
    }

    /// What is ahead of the log added to the counts under a key.
    pub fn added(&self, key: &[u8]) -> Totals {
        self.added.and_then(|added| added.get(key)).copied().unwrap_or_default()
    }

    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        match self.ahead.and_then(|ahead| ahead.get(key)) {
            Some(written) => Ok(written.value.clone()),
            None => self.store.get(key),
        }
    }

    /// Visits the records with `from <= key < to` in key order until `visit` breaks.
    pub fn range(&self, from: &[u8], to: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>) -> Result<(), StoreError> {
        if from >= to {
            return Ok(());
        }
        let Some(ahead) = self.ahead else { return self.store.range(from, to, visit) };
        let over = ahead.range::<[u8], _>((std::ops::Bound::Included(from), std::ops::Bound::Excluded(to)));
        let over = over.map(|(key, written)| (key.as_slice(), written.value.as_deref()));
        merged(over, |visit| self.store.range(from, to, visit), visit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Batch, MemoryStore};

    fn view_of(store: &[(u8, u8)], ahead: &[(u8, Option<u8>)], limit: usize) -> Vec<(u8, u8)> {
        let base = MemoryStore::default();
        base.write(store.iter().map(|(key, value)| (vec![*key], Some(vec![*value]))).collect::<Batch>()).unwrap();
        let ahead = ahead.iter().map(|(key, value)| (vec![*key], Written { value: value.map(|value| vec![value]), by: 0 })).collect();
        let mut found = Vec::new();
        View::ahead(&base, &ahead, &BTreeMap::new())
            .range(&[1], &[9], &mut |key, value| {
                if found.len() == limit {
                    return ControlFlow::Break(());
                }
                found.push((key[0], value[0]));
                ControlFlow::Continue(())
            })
            .unwrap();
        found
    }

    #[test]
    fn a_range_shows_what_is_ahead_in_the_place_of_what_is_committed() {
        let base = [(0, 0), (2, 1), (4, 1), (6, 1), (9, 1)];
        let ahead = [(0, Some(2)), (1, Some(2)), (2, None), (4, Some(2)), (5, None), (7, Some(2)), (9, Some(2))];
        assert_eq!(view_of(&base, &ahead, 9), [(1, 2), (4, 2), (6, 1), (7, 2)]);
        assert_eq!(view_of(&base, &ahead, 2), [(1, 2), (4, 2)]);
        assert_eq!(view_of(&base, &[], 9), [(2, 1), (4, 1), (6, 1)]);
        assert_eq!(view_of(&[], &ahead, 1), [(1, 2)]);
    }
}
