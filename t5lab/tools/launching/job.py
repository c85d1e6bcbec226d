"""The command to launch, which is the same on every host, and the folder that it writes to.

All of it is text that --dry-run prints and manifests store, so nothing of the caller's environment
gets in, and anything that looks like a secret is refused.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import re

from t5lab.errors import UsageError

PORT = 8476                    # of JAX's coordinator, on every platform
MOUNT = '/mnt/t5lab'           # buckets are mounted below it, under their names

# Exit codes. After "preempted" and "watchdog" the same command can resume; so it can after a signal
# (128 + number), because a host died or JAX ended the process when another one died.
RETRY = (75, 124)
FINAL = (2, 3, 4, 70)          # usage, data, checkpoint, numerical: a retry would end the same way

# The environment of a job is what --env sets, under these names only, which hold no secrets.
ENVIRONMENT = re.compile(r'(T5LAB_|JAX_|XLA_|NCCL_|LIBTPU_INIT_ARGS$|TFDS_DATA_DIR$|'
                         r'TF_CPP_MIN_LOG_LEVEL$)\w*')

SECRETS = (
    re.compile(r'://[^/\s@]+:[^/\s@]+@'),                           # user:password@ in a URL
    re.compile(r'[?&](?i:[\w-]*(token|signature|secret|password|key)|sig)='),   # signed URLs
    re.compile(r'(?i)\b(password|passwd|secret|api_?key|access_?token|auth_?token)\s*[=:]\s*\S'),
    re.compile(r'\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}\b|'
               r'\bAIza[\w-]{35}|\bya29\.[\w-]+|-----BEGIN '),
)


@dataclasses.dataclass(frozen=True)
class LaunchJob:
  """A command of t5lab for all hosts.

  config: FILE[:ARG] as every host sees it. workdir: a folder that all hosts share, or gs://….
  command: 'train' or 'doctor'. overrides: e.g. {'optim.lr': '1e-3'}. restarts: how often a job that
  ends with 75, 124 or a signal is started again.
  """
  config: str
  workdir: str
  command: str = 'train'
  overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
  arguments: tuple[str, ...] = ()
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
  name: str = ''
  restarts: int = 0

  def __post_init__(self):
    texts = {'--config': self.config, '--workdir': self.workdir, '--name': self.name,
             **{f'--config.{k}': f'{k}={v}' for k, v in self.overrides.items()},
             **{f'--env {k}': f'{k}={v}' for k, v in self.environment.items()},
             **{f'argument {i + 1}': a for i, a in enumerate(self.arguments)}}
    for flag, text in texts.items():
      if any(pattern.search(text) for pattern in SECRETS):       # the message does not repeat it
        raise UsageError(f'{flag} seems to contain a password, key or token, which would be '
                         'printed and stored; give the hosts a service account or a file of their '
                         'own instead')
    for key in self.environment:
      if not ENVIRONMENT.fullmatch(key):
        raise UsageError(f'--env {key}: the environment of a job is printed and stored, so only '
                         'T5LAB_…, JAX_…, XLA_…, NCCL_…, LIBTPU_INIT_ARGS and TFDS_DATA_DIR can be '
                         'set')
    if self.restarts < 0:
      raise UsageError(f'--restarts must be 0 or more, got {self.restarts}')
    if not self.name:
      object.__setattr__(self, 'name', default_name(self.workdir))
    if not re.fullmatch(r'[a-z]([a-z0-9-]{0,38}[a-z0-9])?', self.name):
      raise UsageError('--name must be a lowercase letter, then lowercase letters, digits and '
                       'hyphens, at most 40 in all, as Kubernetes requires, got '
                       f'{self.name!r}')

  @property
  def on_bucket(self) -> bool:
    return self.workdir.startswith('gs://')

  @property
  def bucket(self) -> str:
    """'' unless workdir is gs://BUCKET/…"""
    return self.workdir.removeprefix('gs://').split('/')[0] if self.on_bucket else ''

  @property
  def folder(self) -> str:
    """The workdir as the hosts see it. Checkpoints need a folder with rename and fsync."""
    if not self.on_bucket:
      return self.workdir
    return f'{MOUNT}/{self.workdir.removeprefix("gs://").strip("/")}'

  def argv(self, python: str) -> list[str]:
    """The command that every host runs."""
    return [python, '-m', 't5lab', self.command, '--config', self.config, '--workdir',
            self.folder, *(f'--config.{k}={v}' for k, v in self.overrides.items()),
            *self.arguments]


def check_remote(job: LaunchJob) -> None:
  """Raises UsageError unless other machines can use the workdir under this name."""
  if job.on_bucket:
    if not re.fullmatch(r'gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]/[^\s]+', job.workdir):
      raise UsageError(f'--workdir must be gs://BUCKET/FOLDER, got {job.workdir}; the name of a '
                       'bucket has 3 to 63 lowercase letters, digits, ".", "_" and "-", and the '
                       'folder has no spaces')
  elif '://' in job.workdir or not job.workdir.startswith('/'):
    raise UsageError(f'--workdir must be gs://BUCKET/FOLDER or the absolute path of a folder that '
                     f'every host has mounted (NFS, Filestore, Lustre), got {job.workdir}')


def default_name(workdir: str) -> str:
  """The name of machines and jobs: the same for every launch of a workdir, so that two collide."""
  last = re.sub(r'[^a-z0-9]+', '-', workdir.rstrip('/').rpartition('/')[2].lower()).strip('-')
  digest = hashlib.sha256(workdir.encode()).hexdigest()[:6]
  return f't5lab-{(last or "run")[:20].strip("-")}-{digest}'


def can_retry(code: int) -> bool:
  """Returns True if the same command may resume after this exit code."""
  return code in RETRY or code < 0 or code > 128


def worst(codes) -> int:
  """The exit code of a job whose processes ended with `codes` (-N: by signal N).

  Of several hosts one fails and the others are then ended, so an error that a retry would repeat
  precedes one that it would not: 2, 3, 4 and 70, in this order; then any unknown code; 124; a
  signal, as 128 + N; 75; 0.
  """
  def rank(code):
    if code in FINAL:
      return FINAL.index(code)
    ranks = {124: 5, 75: 7, 0: 8}
    return ranks.get(code, 6 if can_retry(code) else 4)

  code = min(codes, key=rank)
  return 128 - code if code < 0 else code
