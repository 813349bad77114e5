//! Bytes in records: as a whole, and not one by one as serde has lists.
//!
//! For `#[serde(with = "ctfs_types::octets")]`. The bytes are taken from what is decoded, so a length that claims more
//! than there is costs no memory.

use std::borrow::Cow;

use serde::{Deserializer, Serializer};

/// # Errors
/// The serializer's.
pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

/// # Errors
/// The deserializer's.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let bytes: Cow<'de, [u8]> = serde_bytes::deserialize(deserializer)?;
    Ok(bytes.into_owned())
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use crate::codec;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Octets(#[serde(with = "crate::octets")] Vec<u8>);

    #[test]
    fn they_are_in_a_record_as_a_list_of_bytes_is() {
        for len in [0, 1, 250, 251, 70_000] {
            let bytes = vec![7; len];
            let record = codec::encode(1, &Octets(bytes.clone()));
            assert_eq!(record, codec::encode(1, &bytes));
            assert_eq!(codec::decode(1, &record, 1 << 20), Ok(Octets(bytes)));
        }
    }

    #[test]
    fn more_than_there_are_is_refused() {
        let mut record = codec::encode(1, &Octets(vec![7; 1000]));
        record.truncate(900);
        assert!(matches!(codec::decode::<Octets>(1, &record, 1 << 20), Err(codec::CodecError::Malformed(_))));
        // 2^62 of them.
        let claim = [&[1, 253][..], &(1u64 << 62).to_le_bytes(), &[7; 10]].concat();
        assert!(matches!(codec::decode::<Octets>(1, &claim, 1 << 20), Err(codec::CodecError::Malformed(_))));
    }
}
