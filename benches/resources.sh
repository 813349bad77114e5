# What CTFS uses: memory, processor, wire and disk. Part of scripts/bench, which sources it.
# shellcheck shell=bash disable=SC2154

resource() { put "{\"resource\": \"$1\", \"unit\": \"$2\", \"value\": $3}"; }
calc() { python3 -c "print(round($1, 4))"; }
now() { date +%s.%N; }

pids() { local i; for i in $(seq "$servers"); do cluster pid "$i"; done; }
# Processor time of all daemons, in clock ticks. The command's name may hold spaces.
cpu() { local p t=0; for p in $(pids); do t=$((t + $(sed 's/.*) //' "/proc/$p/stat" | awk '{print $12 + $13}'))); done; echo "$t"; }
ticks=$(getconf CLK_TCK)
# Bytes that all servers sent, counted once each by their sender.
wire() {
    local i
    for i in $(seq "$servers"); do nsenter --net="/run/netns/ctfs-$name-$i" cat /proc/net/dev; done |
        awk '$1 == "eth0:" {sum += $10} END {print sum + 0}'
}
segments() { du -sc --block-size=1 "$work"/cluster/s*/state/chunks/segments | awk 'END {print $1}'; }

at_rest() {
    local i=0 p before sent
    for p in $(pids); do
        i=$((i + 1))
        resource "memory at rest, server $i, $files files more" MiB "$(awk '/^VmRSS/ {print $2 / 1024}' "/proc/$p/status")"
        resource "memory at most so far, server $i" MiB "$(awk '/^VmHWM/ {print $2 / 1024}' "/proc/$p/status")"
    done
    before=$(cpu) sent=$(wire)
    sleep 5
    resource "processor at rest, all servers" "% of a core" "$(calc "($(cpu) - $before) / $ticks / 5 * 100")"
    resource "wire at rest, all servers" "KiB/s" "$(calc "($(wire) - $sent) / 5 / 1024")"
}

# Writes the sample into a directory and counts; then reads it cold from server $3.
write_and_read() {
    local what=$1 below=$2 reader=$3 there i before sent disk start took
    local bytes=$((sample * 1048576)) gib
    gib=$(calc "$sample / 1024")
    there=$(mnt "$reader")${below#"$(mnt "$on")"}/sample
    before=$(cpu) sent=$(wire) disk=$(segments) start=$(now)
    bounded 120 dd if="$work/sample" of="$below/sample" bs=1M conv=fsync status=none ||
        { resource "write and fsync, $what" MiB/s null; return; }
    took=$(calc "$(now) - $start")
    sleep 2 # copies that were not waited for
    resource "write and fsync, $what" MiB/s "$(calc "$sample / $took")"
    resource "processor per GiB written, $what" s "$(calc "($(cpu) - $before) / $ticks / $gib")"
    resource "sent per byte written, $what" ratio "$(calc "($(wire) - $sent) / $bytes")"
    resource "chunk store per byte written, $what" ratio "$(calc "($(segments) - $disk) / $bytes")"

    for i in $(seq "$servers"); do ctfs "$i" cache drop >/dev/null || say "the cache of server $i is not dropped"; done
    evict "$there" || true
    before=$(cpu) sent=$(wire) start=$(now)
    bounded 120 dd if="$there" of=/dev/null bs=1M status=none ||
        { resource "read cold, $what" MiB/s null; return; }
    took=$(calc "$(now) - $start")
    resource "read cold, $what" MiB/s "$(calc "$sample / $took")"
    resource "processor per GiB read cold, $what" s "$(calc "($(cpu) - $before) / $ticks / $gib")"
    resource "sent per byte read cold, $what" ratio "$(calc "($(wire) - $sent) / $bytes")"
    bounded 120 cmp "$work/sample" "$there" || die "wrong bytes read back"
}

resources() {
    local data other disk
    data=$(mnt "$on")/resources
    bounded 20 mkdir "$data" "$data/fill"
    bounded $((60 + files / 50)) python3 "$here/benches/metadata.py" "$data/fill" --fill "$files" ||
        say "not all $files files were made"
    sleep 3
    at_rest
    if [ "$servers" = 1 ]; then
        write_and_read "1 copy" "$data" 1
    else
        other=$((on % servers + 1))
        # Every server has a copy, so what another server reads is on its own disk.
        write_and_read "3 copies" "$data" "$other"
        # One copy: two thirds of it lie elsewhere. Other bytes, as the same ones are stored already.
        head -c $((sample * 1048576)) /dev/urandom >"$work/sample"
        bounded 20 mkdir "$data/single"
        ctfs "$on" policy set --copies 1 "$data/single" >/dev/null
        write_and_read "1 copy" "$data/single" "$other"
    fi
    # Bytes as programs have them, which can be compressed.
    disk=$(segments)
    if bounded 120 dd if="$CTFS_BIN" of="$data/program" bs=1M conv=fsync status=none; then
        sleep 2
        resource "chunk store per byte of this program, auto copies" ratio "$(calc "($(segments) - $disk) / $(stat -c %s "$CTFS_BIN")")"
    else
        resource "chunk store per byte of this program, auto copies" ratio null
    fi
    resource "metadata on disk, all servers" MiB "$(du -sc --block-size=1024 "$work"/cluster/s*/state/meta | awk 'END {print $1 / 1024}')"
}
