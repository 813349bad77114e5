#!/usr/bin/env bash
# PostgreSQL on two mounts of one file system: filled and used on the first, killed there in the
# middle, recovered, checked, then started on the second.
#
#   postgresql.sh MOUNT1 MOUNT2 SCALE SECONDS
#
# Prints "balances: ACCOUNTS|TELLERS|BRANCHES|HISTORY|TRANSACTIONS" on each server, which agree.
set -euo pipefail
one=$1/postgresql two=$2/postgresql scale=$3 seconds=$4
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
scratch=$(mktemp -d)
chown postgres:postgres "$scratch"
cd "$scratch"
port=54329 log=$scratch/log
# Not a function: a process started with it in the background is the program itself.
as=(setpriv --reuid postgres --regid postgres --clear-groups env "HOME=$scratch" "PGHOST=$scratch" "PGPORT=$port" "PATH=$bin:$PATH")
postmaster=
# The server is a child of this shell, so that it is reaped when it is killed: the next one refuses
# to start while a process with the number in its pid file is there.
start() {
    "${as[@]}" postgres -D "$1" -p "$port" -k "$scratch" -c listen_addresses= -c shared_buffers=32MB >>"$log" 2>&1 &
    postmaster=$!
    for _ in $(seq 600); do
        "${as[@]}" pg_isready -q && return
        kill -0 "$postmaster" 2>/dev/null || break
        sleep 0.1
    done
    echo "PostgreSQL does not start on $1" >&2
    tail -n 30 "$log" >&2
    exit 1
}
stop() {
    kill -INT "$postmaster"
    wait "$postmaster" || true
    postmaster=
}
finish() {
    if [ -n "$postmaster" ]; then kill -QUIT "$postmaster" 2>/dev/null && wait "$postmaster" || true; fi
    rm -rf "$scratch"
}
trap finish EXIT
balances() {
    echo "balances: $("${as[@]}" psql -At bench -c 'select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers), (select sum(bbalance) from pgbench_branches), (select sum(delta) from pgbench_history), (select count(*) from pgbench_history)')"
}
check() {
    "${as[@]}" pg_amcheck "${@:2}" --heapallindexed
    echo "amcheck: clean on $1"
}

mkdir "$one"
chown postgres:postgres "$one"
chmod 700 "$one"
"${as[@]}" initdb -D "$one" --auth=trust >"$log" 2>&1 || { tail -n 30 "$log" >&2; exit 1; }
start "$one"
"${as[@]}" createdb bench
"${as[@]}" psql -q bench -c 'create extension amcheck'
"${as[@]}" pgbench -i -q -s "$scale" bench 2>&1 | tail -n 1
"${as[@]}" pgbench -c 4 -T "$seconds" bench 2>&1 | grep -E '^tps|number of failed'

transactions() { "${as[@]}" psql -At bench -c 'select count(*) from pgbench_history'; }
before=$(transactions)
# -n: it does not empty the history, whose sum is compared below.
"${as[@]}" pgbench -n -c 4 -T 300 bench >bench.out 2>&1 &
bench=$!
for _ in $(seq 100); do
    [ "$(transactions)" -gt $((before + 20)) ] && break
    sleep 0.1
done
backends=$(ps -o pid= --ppid "$postmaster")
kill -9 "$postmaster"
wait "$postmaster" || true
postmaster=
kill "$bench" 2>/dev/null || true
wait "$bench" || true
# The others notice that the postmaster is gone, and end.
for backend in $backends; do
    for _ in $(seq 600); do kill -0 "$backend" 2>/dev/null || break; sleep 0.1; done
done

start "$one"
grep -q 'database system was not properly shut down' "$log"
echo "recovered: $(grep -c 'redo done' "$log") time"
check 1 --all --install-missing
balances
stop
start "$two"
check 2 bench
balances
"${as[@]}" psql -q bench -c 'create table written_on_two as select generate_series(1, 1000)'
stop
start "$one"
[ "$("${as[@]}" psql -At bench -c 'select count(*) from written_on_two')" = 1000 ]
stop
