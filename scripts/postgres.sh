#!/usr/bin/env bash
# A PostgreSQL server of one's own: on a folder and a Unix socket, without a port, for tests and for trying things out.
#
#   scripts/postgres.sh start [FOLDER]   prints FOLDER: host=FOLDER is the server (user "owner"; a new folder in /tmp if none is named)
#   scripts/postgres.sh stop FOLDER      ends the server; the data stay
#   scripts/postgres.sh remove FOLDER    ends the server and removes the folder
#   scripts/postgres.sh find             prints where initdb and pg_ctl are; exit code 3 where there are none
#
# The server's processes may use POSTGRES_MEMORY_MB (2048) each, so no query takes the machine's memory. It refuses to run as root, so
# root starts it as POSTGRES_USER (postgres, or else nobody).
set -euo pipefail

find_binaries() {
  local found
  if found=$(command -v initdb); then dirname "$found"; return; fi
  found=$(ls -d /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /opt/homebrew/opt/postgresql*/bin 2>/dev/null | sort -V | tail -n 1)
  [ -n "$found" ] && [ -x "$found/initdb" ] && { echo "$found"; return; }
  echo "no PostgreSQL server is installed: 'apt-get install postgresql' on Debian, 'brew install postgresql' on a Mac" >&2
  return 3
}

as_user() { # the server's user, if we are root
  if [ "$(id -u)" -eq 0 ]; then
    # From a folder that any user may enter, or every command warns.
    (cd / && setpriv --reuid "$user" --regid "$(id -g "$user")" --clear-groups "$@")
  else
    "$@"
  fi
}

start() {
  local folder=${1:-$(mktemp -d /tmp/pg-XXXXXX)}
  mkdir -p "$folder"
  folder=$(cd "$folder" && pwd)
  if [ "${#folder}" -gt 85 ]; then
    echo "$folder: too long for a Unix socket, which may have 107 characters; take a shorter one" >&2
    return 2
  fi
  [ "$(id -u)" -eq 0 ] && chown "$user" "$folder"
  if [ ! -d "$folder/data" ]; then
    as_user "$binaries/initdb" -D "$folder/data" -U owner --auth=trust --encoding=UTF8 --locale=C.UTF-8 --no-sync >"$folder/initdb.log" 2>&1 || {
      cat "$folder/initdb.log" >&2
      return 1
    }
  fi
  # Nothing here outlives a crash of the machine, so nothing waits for the disk.
  local options="-k '$folder' -c listen_addresses='' -c unix_socket_permissions=0700 -c fsync=off -c synchronous_commit=off"
  options+=" -c full_page_writes=off -c shared_buffers=32MB -c max_connections=60 -c temp_file_limit=256MB -c autovacuum=off"
  (
    ulimit -v $((${POSTGRES_MEMORY_MB:-2048} * 1024))
    as_user "$binaries/pg_ctl" -D "$folder/data" -w -t 60 -l "$folder/log" -o "$options" start >/dev/null
  ) || {
    tail -n 20 "$folder/log" >&2
    return 1
  }
  echo "$folder"
}

stop() {
  [ -f "$1/data/postmaster.pid" ] || return 0
  as_user "$binaries/pg_ctl" -D "$1/data" -m immediate -w stop >/dev/null
}

user=${POSTGRES_USER:-$(id -u postgres >/dev/null 2>&1 && echo postgres || echo nobody)}
binaries=$(find_binaries)
case ${1:-} in
  start) start "${2:-}" ;;
  stop) stop "$2" ;;
  remove)
    stop "$2"
    rm -rf "$2/data" "$2/log" "$2/initdb.log"
    rmdir "$2"
    ;;
  find) echo "$binaries" ;;
  *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
