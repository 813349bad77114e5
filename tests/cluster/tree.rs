//! A tree with everything a file system can hold, and the comparison of two trees.

use std::{
    collections::BTreeMap,
    ffi::{CString, OsString},
    fs,
    os::unix::{ffi::OsStrExt, fs::{FileTypeExt, MetadataExt}},
    path::{Path, PathBuf},
};

/// Everything that can be seen of one entry.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    mode: u32,
    uid: u32,
    gid: u32,
    size: u64,
    rdev: u64,
    mtime: (i64, i64),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    target: Option<PathBuf>,
    content: Option<u64>,
    /// First path of the hard-link group.
    links: PathBuf,
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("paths hold no NUL")
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let c_path = c_path(path);
    let mut names = vec![0u8; 65536];
    // SAFETY: the buffer is as long as said, the path NUL-terminated.
    let len = unsafe { libc::llistxattr(c_path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    assert!(len >= 0, "llistxattr {}: {}", path.display(), std::io::Error::last_os_error());
    let mut found = BTreeMap::new();
    for name in names[..len as usize].split(|b| *b == 0).filter(|name| !name.is_empty()) {
        let c_name = CString::new(name).expect("names were split at NUL");
        let mut value = vec![0u8; 65536];
        // SAFETY: as above.
        let len = unsafe { libc::lgetxattr(c_path.as_ptr(), c_name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        assert!(len >= 0, "lgetxattr {} {:?}: {}", path.display(), c_name, std::io::Error::last_os_error());
        value.truncate(len as usize);
        found.insert(name.to_vec(), value);
    }
    found
}

fn hash(bytes: &[u8]) -> u64 {
    use std::hash::{Hash, Hasher};
    let mut hasher = std::hash::DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// Reads a whole tree, keyed by path below `root`.
pub fn read(root: &Path) -> BTreeMap<PathBuf, Entry> {
    let mut tree = BTreeMap::new();
    let mut groups: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let mut left = vec![PathBuf::new()];
    while let Some(dir) = left.pop() {
        let mut names: Vec<OsString> = fs::read_dir(root.join(&dir))
            .unwrap_or_else(|e| panic!("read_dir {}: {e}", root.join(&dir).display()))
            .map(|entry| entry.expect("read a directory entry").file_name())
            .collect();
        names.sort();
        for name in names {
            let path = dir.join(name);
            let full = root.join(&path);
            let meta = fs::symlink_metadata(&full).unwrap_or_else(|e| panic!("lstat {}: {e}", full.display()));
            let kind = meta.file_type();
            if kind.is_dir() {
                left.push(path.clone());
            }
            let links = if meta.nlink() > 1 && !kind.is_dir() {
                groups.entry(meta.ino()).or_insert_with(|| path.clone()).clone()
            } else {
                PathBuf::new()
            };
            let entry = Entry {
                mode: meta.mode(),
                uid: meta.uid(),
                gid: meta.gid(),
                size: if kind.is_dir() { 0 } else { meta.size() },
                rdev: if kind.is_char_device() || kind.is_block_device() { meta.rdev() } else { 0 },
                mtime: (meta.mtime(), meta.mtime_nsec()),
                xattrs: xattrs(&full),
                target: kind.is_symlink().then(|| fs::read_link(&full).expect("readlink")),
                content: kind.is_file().then(|| hash(&fs::read(&full).unwrap_or_else(|e| panic!("read {}: {e}", full.display())))),
                links,
            };
            tree.insert(path, entry);
        }
    }
    // The group's name is its smallest path, whatever order the walk had.
    let mut smallest: BTreeMap<PathBuf, PathBuf> = BTreeMap::new();
    for (path, entry) in &tree {
        if entry.links.as_os_str().is_empty() {
            continue;
        }
        let name = smallest.entry(entry.links.clone()).or_insert_with(|| path.clone());
        if path < name {
            *name = path.clone();
        }
    }
    for entry in tree.values_mut() {
        if let Some(name) = smallest.get(&entry.links) {
            entry.links = name.clone();
        }
    }
    tree
}

/// Every difference between two trees, a line each.
pub fn differences(left: &Path, right: &Path) -> Vec<String> {
    let (left, right) = (read(left), read(right));
    let mut lines = Vec::new();
    for (path, entry) in &left {
        match right.get(path) {
            None => lines.push(format!("missing: {path:?}")),
            Some(other) if other != entry => lines.push(format!("{path:?}:\n  {entry:?}\n  {other:?}")),
            Some(_) => {}
        }
    }
    lines.extend(right.keys().filter(|path| !left.contains_key(*path)).map(|path| format!("extra: {path:?}")));
    lines
}

/// Makes a tree of at least `files` real files (system headers and crate sources) and every
/// oddity of metadata, on a local file system.
pub fn make(root: &Path, files: usize) {
    let script = format!(
        r#"
set -euo pipefail
root={root}
mkdir -p "$root/real"
mkdir -p "$root/real"
list=$(mktemp)
for source in /usr/include "$HOME/.cargo/registry/src" /usr/share/doc /usr/lib/python3; do
    [ -d "$source" ] && find "$source" -xdev -type f -size -256k -print0 >>"$list"
done
python3 -c 'import sys; names = open(sys.argv[1], "rb").read().split(b"\0")[:int(sys.argv[2])]; sys.stdout.buffer.write(b"\0".join(names))' "$list" {files} | tar --null -T - -P -cf - | tar -C "$root/real" -xf - --strip-components=1
rm -f "$list"
cd "$root"
mkdir odd && cd odd
echo original > a; ln a b; mkdir d; ln a d/c
ln -s a symlink; ln -s /nowhere/at/all dangling; ln -s "$(printf 'x%.0s' $(seq 3000))" long-symlink
mkfifo fifo
python3 -c 'import socket; s = socket.socket(socket.AF_UNIX); s.bind("socket")'
mknod char c 1 3; mknod block b 7 200; mknod big c 300 70000
echo s > setuid; chmod 4755 setuid
echo g > setgid; chmod 2755 setgid
mkdir sticky; chmod 1777 sticky; mkdir sgid-dir; chmod 2775 sgid-dir
echo o > owned; chown 12345:54321 owned; chown -h 4000000000:1 symlink
mkdir no-access; chmod 000 no-access; echo z > no-mode; chmod 000 no-mode
setfattr -n user.comment -v 'a value' a
setfattr -n user.binary -v 0x00ff10 owned
setfattr -n trusted.ctfs-test -v 0x0102 a
setfattr -n security.ctfs-test -v seven setuid
setfattr -h -n trusted.on-link -v yes symlink
setfattr -n user.on-dir -v dir d
setfacl -m u:1234:rw-,g:99:r-- a
setfacl -m u:77:rwx d; setfacl -d -m u:1000:rwx,g::r-x,o::--- d
truncate -s 10M sparse; printf middle | dd of=sparse bs=1 seek=5000000 conv=notrunc status=none
truncate -s 3M only-hole; : > empty
head -c 4096 /dev/urandom > inline-most; head -c 4097 /dev/urandom > inline-more
head -c 1048576 /dev/urandom > one-chunk; head -c 2500000 /dev/urandom > three-chunks
touch -- "$(printf 'not-utf8-\xff\xfe')" "$(printf 'new\nline')" "$(printf 'n%.0s' $(seq 255))" ' leading space' '-dash' '*star?'
# rsync leaves a time alone that differs in its nanoseconds only, so nothing may be as young as its copy.
python3 - "$root" <<'PY'
import os, sys
for n, (path, dirs, files) in enumerate(os.walk(sys.argv[1], topdown=False)):
    for m, name in enumerate(dirs + files):
        os.utime(os.path.join(path, name), ns=(0, (1500000000 + n * 1000 + m) * 10**9 + 123456789), follow_symlinks=False)
PY
touch -d '1960-01-02 03:04:05.123456789' old; touch -d '2100-12-31 23:59:59.999999999' future; touch -h -d '2001-01-01' dangling
touch -d '2010-10-10 10:10:10.101010101' d
"#,
        root = root.display(),
    );
    let output = std::process::Command::new("bash").arg("-c").arg(script).output().expect("run bash");
    assert!(output.status.success(), "making the tree failed: {}", String::from_utf8_lossy(&output.stderr));
}
