"""t5lab: T5, GPT and BERT style Transformers in JAX, trained, evaluated and used from one codebase.

  lab = t5lab.load('runs/quickstart')
  lab.generate(['Turn on the light'])

Importing it imports neither jax nor TensorFlow.
"""

__version__ = '0.1.0'
__all__ = ['Lab', 'load']


def load(workdir, step='latest', weights=None):
  """The trained model of a run's directory: see t5lab.programs.lab.load."""
  from t5lab.programs import lab
  return lab.load(workdir, step, weights)


def __getattr__(name):
  if name == 'Lab':
    from t5lab.programs.lab import Lab
    return Lab
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
