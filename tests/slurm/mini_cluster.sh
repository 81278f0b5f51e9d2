#!/usr/bin/env bash
# A throw-away Slurm of $NODES nodes on one machine: mini_cluster.sh ROOT up|down|exec CMD..|on NODE CMD..|lose NODE|restore NODE
#
# Needs root with CAP_SYS_ADMIN, NET_ADMIN and MKNOD; writes only under ROOT. Each node is a PID, network, mount and host
# name namespace inside one of the cluster's: nothing in a test can signal a process outside, and `down` ends one pid.
set -euo pipefail
ROOT=$1 VERB=$2; shift 2
NODES=${NODES:-3} GPUS=8 CPUS=64
export SLURM_CONF=$ROOT/etc/slurm.conf

init_pid() { awk '{print $1}' "/proc/$(<"$ROOT/run/cluster.pid")/task/$(<"$ROOT/run/cluster.pid")/children"; }
inside() { nsenter -t "$(init_pid)" -n -m -p --wd="$PWD" -- "$@"; }

configure() {
    rm -rf "$ROOT"
    mkdir -p "$ROOT"/{etc,run,state,spool,log,dev}
    (umask 077 && head -c 1024 /dev/urandom >"$ROOT/etc/munge.key")
    # Slurm takes only character devices for GPUs: these are /dev/null by another name.
    for ((g = 0; g < GPUS; g++)); do mknod "$ROOT/dev/nvidia$g" c 1 3; done
    cat >"$ROOT/etc/slurm.conf" <<CONF
ClusterName=mini
SlurmctldHost=$(hostname)(10.77.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket=$ROOT/run/munge.socket,cred_expire=6
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmdPidFile=$ROOT/run/slurmd.%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,preempt_youngest_first
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
MailProg=/bin/true
GresTypes=gpu
KillWait=10
OverTimeLimit=0
SlurmdTimeout=10
SlurmctldTimeout=10
MinJobAge=3600
CONF
    for ((i = 1; i <= NODES; i++)); do
        echo "NodeName=n$i NodeAddr=10.77.0.$((10 + i)) NodeHostname=n$i Port=16818 CPUs=$CPUS Sockets=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=500000 Gres=gpu:$GPUS"
    done >>"$ROOT/etc/slurm.conf"
    echo "PartitionName=gpu Nodes=n[1-$NODES] Default=YES MaxTime=1-0 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=n[1-$NODES] MaxTime=1-0 PriorityTier=9" >>"$ROOT/etc/slurm.conf"
    echo "AutoDetect=off
NodeName=n[1-$NODES] Name=gpu File=$ROOT/dev/nvidia[0-$((GPUS - 1))]" >"$ROOT/etc/gres.conf"
    {
        echo "127.0.0.1 localhost"
        echo "10.77.0.1 $(hostname)"
        for ((i = 1; i <= NODES; i++)); do echo "10.77.0.$((10 + i)) n$i"; done
    } >"$ROOT/etc/hosts"
    cat >"$ROOT/etc/node.sh" <<NODE
touch $ROOT/run/node\$1.born  # in the new namespaces, which the parent waits for
hostname n\$1
mount -t tmpfs tmpfs /tmp/rapo-mini
mount -t tmpfs -o size=2g tmpfs /dev/shm
until ip -o link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add 10.77.0.\$((10 + \$1))/24 dev eth0; ip link set eth0 up; ip link set lo up
mkdir -p $ROOT/spool/n\$1; slurmd -D -f $SLURM_CONF -N n\$1 &
while :; do wait -n || :; sleep 0.2; done  # as the namespace's pid 1 it reaps
NODE
    cat >"$ROOT/etc/start_node.sh" <<START
rm -f $ROOT/run/node\$1.born
unshare --net --uts --mount --pid --fork --mount-proc --kill-child --propagation private bash $ROOT/etc/node.sh \$1 >>$ROOT/log/n\$1.log 2>&1 </dev/null &
p=\$!; echo \$p >$ROOT/run/node\$1.pid
until [[ -e $ROOT/run/node\$1.born ]]; do sleep 0.05; done
ip link add v\$1 type veth peer name eth0 netns \$p; ip link set v\$1 master br0 up
START
    cat >"$ROOT/etc/cluster.sh" <<CLUSTER
mount --bind $ROOT/etc/hosts /etc/hosts
mkdir -p /tmp/rapo-mini
ip link set lo up; ip link add br0 type bridge; ip addr add 10.77.0.1/24 dev br0; ip link set br0 up
munged -F --key-file=$ROOT/etc/munge.key --socket=$ROOT/run/munge.socket --pid-file=$ROOT/run/munged.pid --log-file=$ROOT/log/munged.log --seed-file=$ROOT/run/munged.seed &
until [[ -S $ROOT/run/munge.socket ]]; do sleep 0.05; done
slurmctld -D -c -f $SLURM_CONF &
for ((i = 1; i <= $NODES; i++)); do . $ROOT/etc/start_node.sh \$i; done
while :; do wait -n || :; sleep 0.2; done
CLUSTER
}

up() {
    configure
    setsid unshare --net --mount --pid --fork --mount-proc --kill-child --propagation private \
        bash "$ROOT/etc/cluster.sh" </dev/null >"$ROOT/log/cluster.log" 2>&1 &
    echo $! >"$ROOT/run/cluster.pid"
    for _ in $(seq 400); do
        [[ $(inside sinfo -h -p gpu -t idle -o %D 2>/dev/null) == "$NODES" ]] && return
        sleep 0.25
    done
    tail -n 3 "$ROOT"/log/*.log >&2
    echo "the nodes did not become idle; logs in $ROOT/log" >&2
    return 1
}

# The node's first process, by its pid inside the cluster's namespace.
node_init() { inside bash -c "read -r pid rest < /proc/\$(<$ROOT/run/node$1.pid)/task/\$(<$ROOT/run/node$1.pid)/children; echo \$pid"; }

case $VERB in
    up) up ;;
    down)
        pid=$(<"$ROOT/run/cluster.pid")
        tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF "$ROOT/etc/cluster.sh" || { echo "pid $pid is not ours" >&2; exit 1; }
        kill -KILL "$pid"
        ;;
    exec) inside "$@" ;;
    on) node=$1; shift; inside nsenter -t "$(node_init "$node")" -n -m -p -u --wd="$PWD" -- "$@" ;;
    lose) inside bash -c "kill -KILL \$(<$ROOT/run/node$1.pid)" ;;
    restore) inside setsid bash "$ROOT/etc/start_node.sh" "$1" </dev/null >/dev/null 2>&1 ;;
    *) echo "unknown: $VERB" >&2; exit 2 ;;
esac
