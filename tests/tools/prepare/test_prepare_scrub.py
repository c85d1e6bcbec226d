import json

import pytest

from t5lab.tools.prepare import scrub
from t5lab.tools.prepare.job import PrepareJob

MASKED = [
    ('ann@x.org', '<email>'),
    ("'ann@x.org', \"bob@x.org\"", "'<email>', \"<email>\""),
    ('ann.lee+news@mail.example.co.uk.', '<email>.'),
    ('<a@x.org>,_b@x.org_;c@x.org-', '<<email>>,<email>_;<email>-'),
    ("o'hara@x.ie", '<email>'),
    ('jürgen@müller.de', '<email>'),
    ('mailto:a@b.io', 'mailto:<email>'),
    ('10.0.0.1:8080, 192.168.0.1.', '<ip>:8080, <ip>.'),
    ('IP:8.8.8.8/24', 'IP:<ip>/24'),
    ('[2001:db8::1]:443 or fe80::1%eth0', '[<ip>]:443 or <ip>'),
    ('::1 1:2:3:4:5:6:7:8 IPv6:2001:db8::2', '<ip> <ip> IPv6:<ip>'),
    ('::ffff:192.168.1.10', '<ip>'),
    ('4111 1111 1111 1111 exp', '<card> exp'),
    ('4111-1111-1111-1111', '<card>'),
    ('4222222222222 and 5555555555554444.', '<card> and <card>.'),
    ('3782 822463 10005', '<card>'),
    ('6304000000000000000', '<card>'),       # 19 digits
    ('+49 30 1234567', '<phone>'),
    ('+49 (0)30 123456-78', '<phone>'),
    ('+14155552671', '<phone>'),
    ('tel:+1 415 555 2671', 'tel:<phone>'),
    ('0049 170 1234567', '<phone>'),
    ('+33 6 12 34 56 78', '<phone>'),
    ('(415) 555-2671 x3', '<phone> x3'),
    ('415-555-2671, 415.555.2671', '<phone>, <phone>'),
    ('1-800-555-0199 and 1 415 555 2671', '<phone> and <phone>'),
]
KEPT = [
    '@user', 'a@b', 'user@localhost', 'icon@2x.png', 'a @ b.org', 'x@y.org@z',
    'version 1.2.3.4', 'v10.2.3.4', 'section 1.2.3.4', '1.2.3.4.5', '256.1.1.1', '192.168.1',
    '12:34:56', 'a::b', 'std::vector', 'x[1::2]', 'x[..., 100::20]', '::', '00:1a:2b:3c:4d:5e',
    '4111111111111112', '1234567890123456', '4111 1111 1111 1111 1', '978-3-16-148410-0',
    '4000 4001 4002 4003', '41111111111111110000', '411111111111', '5 4111 1111 1111 1111',
    '9111111111111110', '1732467890122',
    '2024-01-15', '15.01.2024', '01/15/2024', '2024-01-15T10:00:00+02:00', '3.11.4',
    'Python 3.11.4, numpy 2.4.6', '1,234,567,890', '5551234567', '123-45-6789', '555-1234',
    '+200 000 000', '1+12345678', '+12345678', '+49301234', '+40.6894-074.0447/', '+1 234',
    '+1 111 222 3333',
    '1e+1234567890', '550e8400-e29b-41d4-a716-446655440000', 'AB-415-555-2671', '115-555-2671',
    '415-155-2671', '415 555 2671', '0000012345678', '3.14159265358979', '2001-2002-2003-2004',
    'https://x.org/415-555-2671', '12345678-1234',
]


@pytest.mark.parametrize('text, masked', MASKED)
def test_masks(text, masked):
  assert scrub.scrub(text) == masked


@pytest.mark.parametrize('text', KEPT)
def test_keeps(text):
  assert scrub.scrub(text) == text
  assert scrub.scrub(f'see {text} there') == f'see {text} there'


def test_reports_kinds_in_order():
  matches = []
  scrub.scrub('+14155552671 a@x.org 8.8.8.8', lambda *match: matches.append(match))
  assert matches == [('email', 'a@x.org'), ('ip', '8.8.8.8'), ('phone', '+14155552671')]


@pytest.mark.parametrize('digits, valid', [
    ('79927398713', True), ('79927398710', False), ('4111111111111111', True), ('0', True),
    ('18', True), ('81', False)])
def test_luhn(digits, valid):
  assert scrub.luhn(digits) is valid


@pytest.mark.parametrize('unit', ["a'", 'a.', '1', '1 ', '+1 ', '1:', 'a@', '(1'])
def test_every_pattern_is_linear_in_time(unit):
  """A quadratic pattern takes minutes here."""
  assert scrub.scrub(unit * 50_000) == unit * 50_000


def test_run_counts_and_hides(tmp_path, capsys):
  source, target = tmp_path / 'a.jsonl', tmp_path / 'b.jsonl'
  rows = [{'text': 'x ' * 300 + 'a@x.org b@x.org', 'n': 1}, {'text': 'plain', 'n': 2}]
  source.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  scrub.run(PrepareJob('scrub', [str(source)], target))
  assert [json.loads(line) for line in target.read_text().splitlines()] == [
      {'text': 'x ' * 300 + '<email> <email>', 'n': 1}, {'text': 'plain', 'n': 2}]
  text = (tmp_path / 'b.jsonl.report.json').read_text()
  report = json.loads(text)
  assert report['rows'] == {'read': 2, 'unreadable': 0, 'changed': 1, 'written': 2}
  assert {kind: rule['count'] for kind, rule in report['rules'].items()} == {
      'email': 2, 'ip': 0, 'card': 0, 'phone': 0}
  assert '@' not in text and '<email>' in report['rules']['email']['examples'][0]['text']
