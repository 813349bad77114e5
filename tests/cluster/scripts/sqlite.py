"""Inserts rows into a SQLite database that others write, too.

    sqlite.py DATABASE WHO COUNT
"""

import sqlite3
import sys

path, who, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
database = sqlite3.connect(path, timeout=60, isolation_level=None)
busy = 0
for i in range(count):
    while True:
        try:
            database.execute("begin immediate")
            database.execute("insert into t(who, i) values(?, ?)", (who, i))
            database.execute("commit")
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            busy += 1
            if database.in_transaction:
                database.execute("rollback")
print(f"server {who}: {count} transactions, busy {busy} times")
