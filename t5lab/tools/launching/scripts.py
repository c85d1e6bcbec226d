"""Pieces of shell that several platforms run on their hosts."""

from collections.abc import Mapping
import shlex

from t5lab.tools.launching.job import AGAIN

# (of the gcsfuse command, of GKE's driver). One folder for all hosts: none may trust what it
# remembers of the others' files, which GKE's own defaults would have it do for ever. A step is
# committed by renaming a folder: atomic in a bucket with a hierarchical namespace; in a flat one
# file by file is copied, up to so many, and the manifest tells a half.
# [cloud.google.com/storage/docs/gcsfuse-cli; GKE: cloud-storage-fuse-csi-driver-perf]
MOUNT_OPTIONS = (
    ('--implicit-dirs', 'implicit-dirs'),
    ('--rename-dir-limit=200000', 'file-system:rename-dir-limit:200000'),
    ('--metadata-cache-ttl-secs=0', 'metadata-cache:ttl-secs:0'),
    ('--metadata-cache-negative-ttl-secs=0', 'metadata-cache:negative-ttl-secs:0'),
)


def exports(environment: Mapping[str, str]) -> str:
  return ''.join(f'export {k}={shlex.quote(v)}\n' for k, v in environment.items())


def mount(bucket: str, folder: str) -> str:
  """Mounts gs://bucket at folder, installing Cloud Storage FUSE where the image lacks it."""
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
  """Runs `command` until it ends for good -> $code. A TERM is passed on, and ends it too."""
  return f"""told=
starts=0
while :; do
  {command} &
  child=$!
  trap 'told=yes; kill -TERM "$child" 2> /dev/null' TERM INT
  wait "$child"; code=$?
  while [ "$code" -gt 128 ] && kill -0 "$child" 2> /dev/null; do wait "$child"; code=$?; done
  case "$code" in
    {'|'.join(map(str, AGAIN))}) ;;
    *) [ "$code" -gt 128 ] || break;;         # over 128: ended by a signal
  esac
  [ -z "$told" ] || break
  starts=$((starts + 1))
  [ "$starts" -le {restarts} ] || break
  echo "t5lab: ended with $code, start $starts of {restarts} more"
  sleep 5
done
"""
