//! Names for clusters that people can say over the phone.

const FIRST: [&str; 32] = [
    "amber", "brave", "bright", "brisk", "calm", "clear", "cobalt", "coral", "crisp", "dapper", "eager", "fair",
    "fleet", "gentle", "golden", "hardy", "jolly", "keen", "lively", "lucid", "mellow", "noble", "plucky", "quick",
    "quiet", "rapid", "silver", "steady", "sunny", "swift", "vivid", "witty",
];
const SECOND: [&str; 32] = [
    "badger", "beaver", "bison", "crane", "curlew", "dolphin", "falcon", "ferret", "finch", "gannet", "heron", "ibex",
    "jackdaw", "kestrel", "lark", "lynx", "marten", "merlin", "osprey", "otter", "petrel", "plover", "puffin", "raven",
    "robin", "salmon", "sparrow", "swallow", "tern", "trout", "walrus", "wren",
];

/// A name like `brave-otter`. For people only: clusters are told apart by their id.
pub fn cluster_name() -> String {
    let pick = |list: &[&'static str; 32]| list[rand::random_range(0..list.len())];
    format!("{}-{}", pick(&FIRST), pick(&SECOND))
}
