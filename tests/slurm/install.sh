#!/bin/sh
# Installs Debian's slurm, for the tests beside it, where that is possible; says so where it is not.
for program in slurmctld slurmd munged srun; do
    command -v $program > /dev/null || missing="$missing $program"
done
[ -z "$missing" ] && exit 0
log=$(mktemp)
if [ "$(id -u)" -eq 0 ] && command -v apt-get > /dev/null &&
    apt-get update > "$log" 2>&1 &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge >> "$log" 2>&1
then
    echo "slurm installed"
else
    tail -n 3 "$log"
    echo "slurm cannot be installed here (missing:$missing): its tests are skipped"
fi
rm -f "$log"
