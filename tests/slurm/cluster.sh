#!/bin/sh
# A SLURM of one node on this machine's loopback address, without systemd: needs Debian's slurm-wlm and munge, and root.
#
#     tests/slurm/cluster.sh start /tmp/slurm      then: export SLURM_CONF=/tmp/slurm/slurm.conf; sbatch, srun, squeue
#     tests/slurm/cluster.sh stop /tmp/slurm
#
# The folder holds all that it writes. The node claims two cores, whatever the machine has.
set -eu
[ $# -eq 2 ] || { echo "usage: $0 start|stop FOLDER" >&2; exit 2; }
mkdir -p "$2"
S=$(realpath "$2")
export SLURM_CONF="$S/slurm.conf"

start() {
    rm -rf "$S/state"  # the node would look idle before it is
    mkdir -p "$S/state" "$S/spool" "$S/log" "$S/munge" "$S/run"
    chmod 700 "$S/munge"
    chmod 711 "$S" "$S/run"  # munge refuses a socket that others cannot reach, from / on
    dd if=/dev/urandom of="$S/munge/key" bs=1024 count=1 2>/dev/null
    chmod 400 "$S/munge/key"
    host=$(hostname -s)
    cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${SLURMCTLD_PORT:-16817}
SlurmdPort=${SLURMD_PORT:-16818}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$S/run/munge.sock
CredType=cred/munge
StateSaveLocation=$S/state
SlurmdSpoolDir=$S/spool
SlurmctldPidFile=$S/run/slurmctld.pid
SlurmdPidFile=$S/run/slurmd.pid
SlurmctldLogFile=$S/log/slurmctld.log
SlurmdLogFile=$S/log/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=10
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    munged --key-file="$S/munge/key" --socket="$S/run/munge.sock" --pid-file="$S/run/munged.pid" \
        --log-file="$S/munge/log" --seed-file="$S/munge/seed"
    slurmctld -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF"
    for _ in $(seq 100); do
        if [ "$(sinfo -h -o %t 2>/dev/null)" = idle ]; then return; fi
        sleep 0.2
    done
    echo "the node did not become idle; see $S/log" >&2
    stop
    exit 1
}

stop() {
    scancel --partition=main 2>/dev/null || true
    for _ in $(seq 100); do
        [ -n "$(squeue -h 2>/dev/null)" ] || break
        sleep 0.2
    done
    for daemon in slurmd slurmctld munged; do
        [ -s "$S/run/$daemon.pid" ] || continue
        pid=$(cat "$S/run/$daemon.pid")
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 20); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        kill -9 "$pid" 2>/dev/null || true
        rm -f "$S/run/$daemon.pid"
    done
}

case $1 in
    start) start ;;
    stop) stop ;;
    *) echo "usage: $0 start|stop FOLDER" >&2; exit 2 ;;
esac
