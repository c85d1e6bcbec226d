"""Shell fragments that several platforms run on their hosts."""

from collections.abc import Mapping
import shlex

from t5lab.tools.launching.job import MOUNT, RETRY

# (option of the gcsfuse command, option of GKE's driver). All hosts share one folder, so no host
# may cache metadata of the others' files, which GKE's driver would cache for ever. A checkpoint is
# committed by renaming a folder. That is atomic in a bucket with a hierarchical namespace; in a
# flat one up to 200,000 files are copied one by one, and the manifest detects a partial copy.
# [cloud.google.com/storage/docs/gcsfuse-cli; GKE: cloud-storage-fuse-csi-driver-perf]
MOUNT_OPTIONS = (
    ('--implicit-dirs', 'implicit-dirs'),
    ('--rename-dir-limit=200000', 'file-system:rename-dir-limit:200000'),
    ('--metadata-cache-ttl-secs=0', 'metadata-cache:ttl-secs:0'),
    ('--metadata-cache-negative-ttl-secs=0', 'metadata-cache:negative-ttl-secs:0'),
)


def exports(environment: Mapping[str, str]) -> str:
  return ''.join(f'export {k}={shlex.quote(v)}\n' for k, v in environment.items())


def mount(bucket: str) -> str:
  """Shell that mounts gs://bucket below MOUNT and installs Cloud Storage FUSE if it is missing."""
  folder = f'{MOUNT}/{bucket}'
  options = ' '.join(option for option, _ in MOUNT_OPTIONS)
  return f"""if ! command -v gcsfuse > /dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key > /dev/null
  repository="https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main"
  echo "deb [signed-by=$key] $repository" \\
    | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get update -qq
  sudo apt-get install -qq -y gcsfuse
fi
sudo mkdir -p {folder}
sudo chown "$(id -u):$(id -g)" {folder} 2> /dev/null || true
mountpoint -q {folder} || gcsfuse {options} {bucket} {folder}
"""


def supervise(command: str, restarts: int) -> str:
  """Shell that runs `command` until its exit code is final, and leaves the code in $code.

  A TERM is passed on to the command and ends the loop too.
  """
  return f"""stopping=
starts=0
while :; do
  {command} &
  child=$!
  trap 'stopping=yes; kill -TERM "$child" 2> /dev/null' TERM INT
  wait "$child"; code=$?
  while [ "$code" -gt 128 ] && kill -0 "$child" 2> /dev/null; do wait "$child"; code=$?; done
  case "$code" in
    {'|'.join(map(str, RETRY))}) ;;
    *) [ "$code" -gt 128 ] || break;;         # above 128: ended by a signal
  esac
  [ -z "$stopping" ] || break
  starts=$((starts + 1))
  [ "$starts" -le {restarts} ] || break
  echo "t5lab: ended with $code, restart $starts of {restarts}"
  sleep 5
done
"""
