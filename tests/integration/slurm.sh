#!/usr/bin/env bash
# A Slurm of one host for tests, with its own key, ports and folders, beside any other.
#
#   tests/integration/slurm.sh start FOLDER    installs the Debian packages where they are missing (as root); status 3
#                                              where that is not possible
#   tests/integration/slurm.sh stop FOLDER
#
# Then: export SLURM_CONF=FOLDER/slurm.conf
set -euo pipefail
folder=$(realpath "$2")
PATH=$PATH:/usr/sbin:/sbin  # where Debian has the daemons

stop() {
    for name in slurmd slurmctld munged; do
        if [ ! -f "$folder/$name.pid" ]; then continue; fi
        pid=$(cat "$folder/$name.pid")
        if kill "$pid" 2> /dev/null; then timeout 10 tail --pid="$pid" -f /dev/null || kill -9 "$pid" || true; fi
    done
}

if [ "$1" = stop ]; then
    SLURM_CONF="$folder/slurm.conf" timeout 10 scancel --user="$(id -un)" --full --signal=KILL || true
    stop
    exit
fi

if ! command -v slurmctld slurmd munged sbatch > /dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    packages="slurm-wlm slurm-client slurmctld slurmd munge"
    # shellcheck disable=SC2086  # several words
    if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages; }; then exit 3; fi
fi

chmod 755 "$folder"
mkdir -p "$folder/state" "$folder/spool"
head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" 2> "$folder/munged.err"

# Two free ports; more CPUs than the host may have, so that two ranks always fit.
read -r control node < <(python3 -c '
import socket
sockets = [socket.create_server(("", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in sockets))')
host=$(hostname -s)
cat > "$folder/slurm.conf" << CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$control
SlurmdPort=$node
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$folder/slurm.conf"
slurmctld
slurmd
for _ in $(seq 60); do
    if sinfo --noheader --format=%t 2> /dev/null | grep -q idle; then exit; fi
    sleep 0.5
done
stop
echo "Slurm did not start: see $folder/slurmctld.log and slurmd.log" >&2
exit 1
