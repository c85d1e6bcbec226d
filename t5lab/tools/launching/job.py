"""What is launched: one command, the same on every host, and where it writes.

Everything here is text that will be printed by --dry-run and stored in manifests, so nothing of the
environment of the person who launches gets in, and what looks like a secret is refused.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import re

from t5lab.errors import UsageError

PORT = 8476                    # of JAX's coordinator, on every platform
MOUNT = '/mnt/t5lab'           # buckets are mounted under their names

# How a job ends. Preempted and watchdog mean: start the same command again. A signal (128 + number)
# is a host that died, or a process that JAX ended because another one did.
AGAIN = (75, 124)
FINAL = (2, 3, 4, 70)          # usage, data, checkpoint, numerical: the same again ends the same

# The environment of a job is what we set, of these names alone. What XLA and JAX read is no secret.
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
class Job:
  """config: FILE[:ARG] as every host sees it. workdir: a folder that all of them share, or gs://.

  command: 'train' or 'doctor'. overrides: {'optim.lr': '1e-3'}. restarts: how often a job that
  ended with 75, 124 or a signal is started again.
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
    given = {'--config': self.config, '--workdir': self.workdir, '--name': self.name,
             **{f'--config.{k}': f'{k}={v}' for k, v in self.overrides.items()},
             **{f'--env {k}': f'{k}={v}' for k, v in self.environment.items()},
             **{f'argument {i + 1}': a for i, a in enumerate(self.arguments)}}
    for what, text in given.items():
      refuse_secret(what, text)
    for key in self.environment:
      if not ENVIRONMENT.fullmatch(key):
        raise UsageError(f'--env {key}: a job gets only T5LAB_…, JAX_…, XLA_…, NCCL_…, '
                         'LIBTPU_INIT_ARGS and TFDS_DATA_DIR, for its environment is printed and '
                         'stored')
    if self.restarts < 0:
      raise UsageError(f'--restarts={self.restarts}: 0 or more')
    if not self.name:
      object.__setattr__(self, 'name', name_of(self.workdir))
    if not re.fullmatch(r'[a-z]([a-z0-9-]{0,38}[a-z0-9])?', self.name):
      raise UsageError(f'--name {self.name!r}: a small letter, then small letters, digits and '
                       'hyphens, 40 in all, as for a Kubernetes object')

  @property
  def bucket(self) -> str:
    """'' unless workdir is gs://BUCKET/…"""
    return self.workdir.removeprefix('gs://').split('/')[0] if self.on_bucket else ''

  @property
  def on_bucket(self) -> bool:
    return self.workdir.startswith('gs://')

  @property
  def folder(self) -> str:
    """The workdir as the hosts see it: checkpoints need a folder with rename and fsync."""
    if not self.on_bucket:
      return self.workdir
    return f'{MOUNT}/{self.workdir.removeprefix("gs://").strip("/")}'

  def argv(self, python: str) -> list[str]:
    """The command of every host."""
    return [python, '-m', 't5lab', self.command, '--config', self.config, '--workdir',
            self.folder, *(f'--config.{k}={v}' for k, v in self.overrides.items()),
            *self.arguments]


def check_remote(job: Job) -> None:
  """UsageError unless other machines can see the workdir under this name."""
  if job.on_bucket:
    if not re.fullmatch(r'gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]/[^\s]+', job.workdir):
      raise UsageError(f'--workdir {job.workdir} is not gs://BUCKET/FOLDER: a bucket has 3 to 63 '
                       'small letters, digits, ".", "_" and "-", a folder no spaces')
  elif '://' in job.workdir or not job.workdir.startswith('/'):
    raise UsageError(f'--workdir {job.workdir}: gs://BUCKET/FOLDER, or the absolute path of a '
                     'folder that every host has mounted (NFS, Filestore, Lustre)')


def refuse_secret(what: str, text: str) -> None:
  """UsageError, without the text, if it looks like a credential."""
  if any(pattern.search(text) for pattern in SECRETS):
    raise UsageError(f'{what} looks as if it held a password, key or token. It would be printed '
                     'and stored: give the hosts a service account, or a file of their own')


def name_of(workdir: str) -> str:
  """A name for machines and jobs that a second launch of the same workdir has too."""
  last = re.sub(r'[^a-z0-9]+', '-', workdir.rstrip('/').rpartition('/')[2].lower()).strip('-')
  tail = hashlib.sha256(workdir.encode()).hexdigest()[:6]
  return f't5lab-{(last or "run")[:20].strip("-")}-{tail}'


def again(code: int) -> bool:
  """Whether the same command may go on after it."""
  return code in AGAIN or code < 0 or code > 128


def worst(codes) -> int:
  """What a job ended with whose processes ended with `codes` (-N: by signal N).

  An error that would come again goes before one that would not: of several hosts one fails, and
  the others are ended. 2, 3, 4 and 70, in this order; then any unknown code; 124; a signal, as
  128 + N; 75; 0.
  """
  def order(code):
    if code in FINAL:
      return FINAL.index(code)
    ranks = {124: 5, 75: 7, 0: 8}
    return ranks.get(code, 6 if again(code) else 4)
  code = min(codes, key=order)
  return 128 - code if code < 0 else code
