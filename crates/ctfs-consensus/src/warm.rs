//! Records of the store that were written or asked for lately, kept in bounded memory.

use std::{collections::HashMap, mem};

/// Bytes in memory, keys, values and bookkeeping together.
const BYTES_MAX: usize = 16 << 20;
/// Bookkeeping of one record, besides its bytes.
const RECORD_OVERHEAD: usize = 112;

/// What is in the store under some keys, or that nothing is.
///
/// Two maps: one takes what comes in, and what is used of the other; when it has half of the bytes the other
/// is dropped and it takes that one's place. So what was not used for a while goes, at no cost of its own.
pub(crate) struct Warm {
    young: HashMap<Vec<u8>, Option<Vec<u8>>>,
    old: HashMap<Vec<u8>, Option<Vec<u8>>>,
    young_bytes: usize,
    bytes_max: usize,
    generation: u64,
}

impl Default for Warm {
    fn default() -> Self {
        Self::with(BYTES_MAX)
    }
}

impl Warm {
    pub fn with(bytes_max: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), young_bytes: 0, bytes_max, generation: 0 }
    }

    /// What the store says under the key; `None`: not known here.
    pub fn get(&mut self, key: &[u8]) -> Option<Option<Vec<u8>>> {
        if let Some(value) = self.young.get(key) {
            return Some(value.clone());
        }
        let (key, value) = self.old.remove_entry(key)?;
        let answer = value.clone();
        self.insert(key, value);
        Some(answer)
    }

    /// The store has this from now on.
    pub fn put(&mut self, key: &[u8], value: &Option<Vec<u8>>) {
        self.old.remove(key);
        self.insert(key.to_vec(), value.clone());
    }

    /// The store had this when the generation was `generation`; later it may have been written over.
    pub fn put_if(&mut self, generation: u64, key: &[u8], value: &Option<Vec<u8>>) {
        if generation == self.generation {
            self.put(key, value);
        }
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What was read of the store before is not to be trusted any more.
    pub fn next_generation(&mut self) {
        self.generation += 1;
    }

    fn insert(&mut self, key: Vec<u8>, value: Option<Vec<u8>>) {
        let size = |value: &Option<Vec<u8>>| value.as_ref().map_or(0, Vec::len);
        let (key_bytes, new) = (key.len() + RECORD_OVERHEAD, size(&value));
        match self.young.insert(key, value) {
            Some(before) => self.young_bytes = self.young_bytes + new - size(&before),
            None => self.young_bytes += key_bytes + new,
        }
        if self.young_bytes > self.bytes_max / 2 {
            self.old = mem::take(&mut self.young);
            self.young_bytes = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(value: u8) -> Option<Vec<u8>> {
        Some(vec![value])
    }

    #[test]
    fn what_is_used_stays_and_what_is_not_goes() {
        let mut warm = Warm::with(20 * (RECORD_OVERHEAD + 2));
        warm.put(b"u", &some(0));
        for key in 0..100u8 {
            warm.put(&[key], &some(key));
            assert_eq!(warm.get(b"u"), Some(some(0)), "used all the time");
        }
        assert_eq!(warm.get(&[99]), Some(some(99)));
        assert_eq!(warm.get(&[0]), None, "not used since");
        assert!(warm.young.len() + warm.old.len() <= 21);
    }

    #[test]
    fn the_last_word_counts_and_that_nothing_is_there_is_known_too() {
        let mut warm = Warm::with(4 * (RECORD_OVERHEAD + 2));
        warm.put(b"a", &some(1));
        warm.put(b"b", &some(1));
        warm.put(b"c", &some(1));
        warm.put(b"a", &None);
        assert_eq!(warm.get(b"a"), Some(None));
        warm.put(b"a", &some(3));
        assert_eq!(warm.get(b"a"), Some(some(3)));
        assert_eq!(warm.get(b"never"), None);
    }

    #[test]
    fn what_was_read_before_something_was_handed_over_is_not_kept() {
        let mut warm = Warm::default();
        let before = warm.generation();
        warm.next_generation();
        warm.put_if(before, b"a", &some(1));
        assert_eq!(warm.get(b"a"), None);
        warm.put_if(warm.generation(), b"a", &some(2));
        assert_eq!(warm.get(b"a"), Some(some(2)));
    }
}
