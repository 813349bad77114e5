//! The bytes on the wire and in a token, compared with `golden.txt`.
//!
//! Where this fails, servers of different versions no longer understand each other: the version in
//! front of it must be raised. See `docs/formats.md`.

use ctfs_types::Timestamp;

use crate::{
    JoinToken,
    wire::{self, BulkLengths, FrameHeader, FrameKind, Status, StreamKind},
};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_encoded_bytes_are_those_of_version_1() {
    let mut lines = Vec::new();
    let mut line = |name: &str, bytes: &[u8]| lines.push(format!("{name}: {}\n", hex(bytes)));
    line("preamble of calls", &wire::preamble(StreamKind::Calls { class: 3 }));
    line("preamble of a bulk transfer", &wire::preamble(StreamKind::Bulk));
    line("preamble of a hello", &wire::preamble(StreamKind::Hello));
    line("preamble of a join", &wire::preamble(StreamKind::Join));
    let kinds = [
        ("request", FrameKind::Request),
        ("reply", FrameKind::Reply),
        ("refusal", FrameKind::Refused),
        ("busy", FrameKind::Busy),
    ];
    for (name, kind) in kinds {
        line(&format!("frame of a {name}"), &wire::frame_header(FrameHeader { kind, call: 0x0102_0304, service: 0x0301 }, 500));
    }
    let len = BulkLengths { header: 33, body: 1 << 20 };
    line("bulk request", &wire::bulk_request(0x0402, len));
    for (name, status) in [("done", Status::Done), ("refused", Status::Refused), ("busy", Status::Busy)] {
        line(&format!("bulk reply {name}"), &wire::bulk_reply(status, len));
        line(&format!("join reply {name}"), &wire::join_reply(status, 70_000));
    }
    let token = JoinToken {
        ca_hash: [7; 32],
        addresses: vec!["10.0.0.1:7420".into(), "[fd00::1]:7420".into()],
        secret: [9; 16],
        expires: Timestamp::new(2_000_000_000, 0),
    };
    lines.push(format!("token: {token}\n"));
    let text = lines.concat();
    let golden = include_str!("golden.txt");
    let differs = text.lines().zip(golden.lines()).find(|(now, then)| now != then);
    assert!(text == golden, "first difference, now and then: {differs:#?}\nall of it now:\n{text}");
}
