#!/usr/bin/env bash
# Start a training command again until it is done:
#
#   recipes/run.sh accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml train_accelerate.py \
#       --recipe recipes/gpt2-124m-10b.yaml --micro_batch_size 64
#
# Exit code 0 ends it, 2 (wrong usage) too. After 75 (a signal; the step is saved), a crash or a lost machine the same
# command starts again and goes on from its newest checkpoint. Three failures in a row within a minute of their start
# end it as well: what goes wrong that soon will again. (`accelerate launch` says 1 for every code but 0, so an error
# that was explained looks like a crash.) Ctrl-C and SIGTERM are passed on: the run saves, and nothing starts again.
set -u
if [ $# -eq 0 ]; then
    echo "usage: $0 COMMAND …" >&2
    exit 2
fi

child="" stopped=""
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' INT TERM

quick_failures=0
while true; do
    began=$SECONDS
    "$@" &
    child=$!
    [ -z "$stopped" ] || kill -TERM "$child" 2>/dev/null # the signal came before the trap knew of the command
    wait "$child"
    code=$?
    if [ -n "$stopped" ]; then # the signal ended the first wait; the run is saving
        wait "$child"
        exit $?
    fi
    case $code in
        0 | 2) exit "$code" ;;
        75) quick_failures=0 ;;
        *)
            if [ $((SECONDS - began)) -lt 60 ]; then
                quick_failures=$((quick_failures + 1))
            else
                quick_failures=0
            fi
            ;;
    esac
    if [ "$quick_failures" -ge 3 ]; then
        echo "$0: three failures in a row, each within a minute (the last: exit code $code), see the error above" >&2
        exit "$code"
    fi
    echo "$0: exit code $code, starting again" >&2
    sleep 3 & # in the background, so that a signal is not kept waiting
    wait $!
    [ -z "$stopped" ] || exit 75
done
