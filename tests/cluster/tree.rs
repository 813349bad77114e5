//! A tree with everything a file system can hold.

use std::path::Path;

/// Makes a tree of at least `files` real files (system headers and crate sources) and every
/// oddity of metadata, on a local file system.
pub fn make(root: &Path, files: usize) {
    let script = format!(
        r#"
set -euo pipefail
root={root}
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
