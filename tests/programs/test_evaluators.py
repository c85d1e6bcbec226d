"""Scoring with another vocabulary and another kind of model, without a model."""

import json

import numpy as np
import pytest

from t5lab.data import vocab
from t5lab.data.sources import corpora
from t5lab.programs.evaluators import Evaluation

pytestmark = pytest.mark.usefixtures('plain_registry')


def test_spellings_are_decoded_and_scored_by_the_target_table(tmp_path):
  letters = ''.join(sorted({c for row in corpora.load('g2p', 'validation') for c in row['word']}))
  (tmp_path / 'characters.json').write_text(json.dumps({
      'inputs': '____' + letters, 'targets': '____' + ''.join(sorted(corpora.G2P_PHONEMES)),
      'pad_id': 0, 'bos_id': 1, 'eos_id': 2, 'unk_id': 3}))
  v = vocab.load(str(tmp_path / 'characters.json'))
  rows = corpora.load('g2p', 'validation')[:4]
  evaluation = Evaluation('g2p_en_us', 'validation', vocab_spec=v.spec, examples=4, batch_size=1,
                          lengths={'inputs': 64, 'targets': 64}, start_id=v.bos_id)

  def generate(requests):
    assert requests == [v.frame(row['word']) for row in rows]
    out = np.zeros((4, 64), np.int32)
    for i, row in enumerate(rows):
      ids = [*v.encode_target(row['phonemes']), v.eos_id, 5]     # what follows the end is ignored
      out[i, :len(ids)] = ids
    out[0, 0] += 1                                               # one wrong phoneme
    return out

  scores, predictions = evaluation.decode(generate)
  phonemes = sum(len(row['phonemes']) for row in rows)
  assert scores == {'g2p_en_us': {'exact_match': 75., 'per': pytest.approx(100 / phonemes)}}
  assert [p.source for p in predictions] == [row['word'] for row in rows]
  assert predictions[3].prediction == predictions[3].target == rows[3]['phonemes']
  batch = next(evaluation._rows.epoch())
  assert (batch['decoder_input_tokens'][:, 0] == v.bos_id).all()
  assert (batch['encoder_input_tokens'][:, 0] == v.bos_id).all()


def test_classes_are_scored_once_each():
  evaluation = Evaluation('docs_match', 'validation', vocab_spec='t5lab_2048', batch_size=32,
                          lengths={'inputs': 128, 'targets': 1}, kind='encoder')

  def sums(batch):
    weight = batch['encoder_loss_weights'].sum()
    return {'loss': weight * 2., 'weight': weight,
            'correct': (batch['encoder_target_tokens'] * batch['encoder_loss_weights']).sum()}
  assert evaluation.loss(sums) == {'loss': 2., 'accuracy': 0.5}
  assert evaluation.decode(None) == ({}, [])


def test_the_loss_of_pairs_is_the_sum_of_two_means():
  evaluation = Evaluation('books_bert', 'validation', vocab_spec='byte',
                          lengths={'inputs': 32, 'targets': 0}, examples=4, kind='encoder')
  sums = dict(loss=10., correct=2., weight=5., nsp_loss=3., nsp_correct=1., nsp_weight=2.)
  assert evaluation.loss(lambda batch: sums) == {
      'loss': 3.5, 'accuracy': 0.4, 'nsp_loss': 1.5, 'nsp_accuracy': 0.5}
