#!/bin/bash
# A Slurm cluster of two nodes on this machine, from Debian's packages slurm-wlm and munge.
#
#   apt-get install slurm-wlm munge            # once, as root
#   tests/slurm/cluster.sh start DIRECTORY     # as root; writes DIRECTORY/environment
#   . DIRECTORY/environment                    # then sbatch, squeue, scontrol … talk to it
#   tests/slurm/cluster.sh stop DIRECTORY
#
# Each node, node1 and node2, is a slurmd with a host name and an /etc/hosts of its own (a UTS and a
# mount namespace). Jobs of the partition `urgent` preempt those of `normal`, which are then requeued.
# Nothing outside DIRECTORY is written, and no service of the system is used.
set -euo pipefail

action=${1:?start or stop}
directory=$(realpath -m "${2:?a directory}")
export SLURM_CONF=$directory/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

end() {  # by process id, each daemon its own
  for name in slurmd-node1 slurmd-node2 slurmctld munged; do
    [ -s "$directory/$name.pid" ] || continue
    pid=$(cat "$directory/$name.pid")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
    rm -f "$directory/$name.pid"
  done
}

if [ "$action" = stop ]; then
  end
  exit
fi

for program in slurmctld slurmd munged sbatch; do
  command -v "$program" > /dev/null || { echo "$program is missing: apt-get install slurm-wlm munge"; exit 3; }
done
[ "$(id -u)" -eq 0 ] || { echo "slurmd has to be started by root"; exit 3; }

mkdir -p "$directory"/{state,spool-node1,spool-node2,munge}
chmod 700 "$directory/munge"
chmod 755 "$directory"
head -c 1024 /dev/urandom > "$directory/munge/key"
chmod 600 "$directory/munge/key"

# Ports from the process id: several clusters can run beside each other.
port=$((20000 + $$ % 5000 * 4))
cat > "$directory/slurm.conf" <<END
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmctldPort=$port
AuthType=auth/munge
# A requeued job may start when its old credentials have expired: 5 s instead of 120.
AuthInfo=socket=$directory/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool-%n
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd-%n.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/linear
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
MinJobAge=600
SlurmdParameters=config_overrides
NodeName=node1 NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=1 RealMemory=1000
NodeName=node2 NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=1 RealMemory=1000
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE State=UP
END
{ cat /etc/hosts; echo "127.0.0.1 node1 node2"; } > "$directory/hosts"
echo "export SLURM_CONF=$directory/slurm.conf" > "$directory/environment"

trap 'echo "the cluster did not start:"; tail -n 5 "$directory"/*.log; end' ERR
munged --force --key-file="$directory/munge/key" --socket="$directory/munge/socket" \
  --pid-file="$directory/munged.pid" --log-file="$directory/munge/log" \
  --seed-file="$directory/munge/seed"
slurmctld -c
for node in node1 node2; do
  unshare --uts --mount --propagation private bash -c '
    mount --bind "$1/hosts" /etc/hosts
    hostname "$2"
    exec slurmd' bash "$directory" "$node"
done
for _ in $(seq 100); do
  [ "$(sinfo --noheader --format=%T --partition=normal | sort -u)" = idle ] && break
  sleep 0.1
done
[ "$(sinfo --noheader --format=%T --partition=normal | sort -u)" = idle ]
