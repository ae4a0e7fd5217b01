#!/bin/sh
# The first program in a worker's container: runs the real one, if what is mounted is what was checked outside.
#
#   enter.sh DIRECTORY [PLACE=DEVICE:INODE …] -- PROGRAM [ARGUMENT…]
#
# The engine looks a directory up by its path, after the check: whoever owns the path could put a link there meanwhile.
# Nothing of what is mounted has run before this, and nothing of it runs where it is something else: exit status 117.
directory=$1
shift
while [ "$1" != -- ]; do
    if [ "$(stat --format=%d:%i "${1%=*}")" != "${1##*=}" ]; then
        echo "blockyard: ${1%=*} is not what was checked before the start, so nothing of it is run" >&2
        exit 117
    fi
    shift
done
shift
cd "$directory" || exit
umask 077
exec "$@"
