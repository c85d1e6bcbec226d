"""The fixed texts on which conversion compares our tokenizer with a directory's own.

They are the inputs on which implementations of one tokenizer differ: runs of whitespace, marks that
a tokenizer uses itself, normal forms, scripts without spaces, joined emoji, and special tokens next
to spaces.
"""

from collections.abc import Iterable
import unicodedata

_WORDS = """
Hello, world!
The quick brown fox jumps over the lazy dog.
translate English to German: The house is wonderful.
I can't, won't, don't; they've said it's y'all's.
Numbers: 0 1 12 123 1234 12345 3.14159 1,000,000 1e-5 0x1F 50% $9.99 #42
e-mail: a.b+c@example.org, https://example.org/path?q=1&r=[2]#top
SHOUTING and CamelCaseWords and snake_case_words and kebab-case-words
supercalifragilisticexpialidocious antidisestablishmentarianism
“Curly quotes”, ‘single’, «guillemets», – en dash, — em dash, ellipsis…
a/b\\c|d~e^f`g'h"i*j+k=l<m>n{o}p[q]r(s)t
... --- !!! ??? ,,, ;;; ::: *** === ___
x = [i**2 for i in range(10) if i % 2 == 0]
<div class="a">&amp;&lt;&#39;</div>
Ünïcödé, naïve café, façade, señor, Ærøskøbing, Łódź, İstanbul, ıi, ß, ẞ, ŒUVRE
Größe 10 m², H₂O, x³, ½ ¼ ⅔, №, ™, ©, ®, ℃, Ⅳ, ﬁ, ﬂ, ﬀ
αβγ ΑΒΓ Ελληνικά γλώσσα
Привет, мир! Ёлка, съешь ещё этих мягких французских булок
Їжак і ґанок
你好，世界！这是一个测试。
東京は日本の首都です。カタカナ ｶﾀｶﾅ ひらがな ー
한국어 띄어쓰기 테스트 각
สวัสดีชาวโลก
नमस्ते दुनिया क्षत्रिय
வணக்கம் உலகம்
မင်္ဂလာပါ
שלום עולם, שָׁלוֹם
مرحبا بالعالم، السَّلامُ ١٢٣
العربية English mixed עברית
Tiếng Việt có dấu
ＦＵＬＬ　ＷＩＤＴＨ １２３
𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒎𝒂𝒕𝒉 𝟙𝟚𝟛
𐍈𐌰𐌿 𒀀 𠀋 𝄞
😀 😃😄 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ ☃ ☃️ #️⃣ 👩🏽‍💻
∀x∈ℝ: ∑ᵢ xᵢ² ≥ 0 ⇒ √2 ≈ 1.414 ± ∞
→ ← ↔ ■ □ ● ○ ★ ☆ ♪ ♫ ✓ ✗
k∑n^2 ⟨ψ|φ⟩ ﷽ ﷺ
Zalgo: Z̸̢͇a̶͍̐l̷̟̈g̵̻̃o̵̡͐
""".strip().split('\n')

_WHITESPACE = [
    '', ' ', '  ', '   ', ' ' * 8, ' ' * 33, '\n', '\n\n', '\n\n\n', '\t', '\t\t', '\r', '\r\n',
    '\r\n\r\n', ' \n', '\n ', ' \n ', '\t \t', 'a ', ' a', '  a', 'a  ', ' a ', '  a  ', 'a  b',
    'a   b', 'a    b', 'a     b c', 'a\tb', 'a\nb', 'a\n\nb', 'a \n b', 'a\r\nb', 'a\t\tb',
    'a \t b', ' leading', '  leading', 'trailing ', 'trailing  ', ' both ', 'tab\tend ', '\tstart',
    'line one\nline two\n', 'line one \n  line two  \n\n', 'para one.\n\npara two.\n',
    'a\u00a0b', '\u00a0', 'a \u00a0 b', 'a\u2003b', 'a\u2009b', 'a\u3000b', 'a\u2028b',
    'a\u2029b', 'a\u0085b', 'a\u000bb', 'a\u000cb', 'a\u1680b', 'a\u200bb', 'a\u200cb', 'a\u200db',
    '\u200b', 'a\u2060b', '\ufeffa', 'a\ufeff', '. a', ' .', ' ,a', 'a . b', '1 2  3', ' 1', ' 你',
    '你 好', ' 😀', '😀 ', '  😀  😀',
]
_MARKS = [
    '\u2581', '\u2581a', 'a\u2581', 'a\u2581b', ' \u2581 a', '\u2581\u2581', 'a_b __c__', '##a',
    'a ##b', '@@ a@@', 'a</w>', '\u0120a', 'a\u0120b', '\u010a', '<0x0A>', '<0x41>', 'a <0xFF> b',
    '[UNK', '<unk', '< s >', '<|', '|>', '<<a>>', '</ s>', '<extra_id_', '<extra_id_x>',
    '<EXTRA_ID_0>', '</S>', '[cls]', '[ MASK ]',
]
_CONTROLS = [
    '\0', 'a\0b', '\x01', 'a\x07b', 'a\x08b', '\x1b[31mred\x1b[0m', '\x7f', 'a\x7fb', 'a\u00adb',
    '\ufffd', 'a\ufffdb', '\ufffe', '\ue000', '\U000f0000', '\U0010ffff', '\u202eabc', 'a\u0301',
    '\u0301', ' \u0301', '\u0300\u0301\u0302', 'a\ufe0f', '\u200d', '\U000e0041', '\u1e9b\u0323',
]
_CODE = [
    'def f(x):\n  return x + 1\n', 'def f(x):\n    if x:\n        return [x]  # list\n\n',
    'for (int i = 0; i < n; ++i) {\n\ta[i] += b[i];\n}\n', 'SELECT * FROM t WHERE a >= 1;',
    '#include <stdio.h>\nint main() { return 0; }', '{"a": [1, 2.5, null], "b": {"c": "d"}}',
    "print('hello', end='')", 'a && b || !c ? d : e', '$ ls -la | grep "x" > /dev/null 2>&1',
    '\\begin{equation} x^2 \\end{equation}', '```python\nx = 1\n```', '- item\n  - sub\n\n1. one',
]
_LONG = ['a' * 100, 'ab' * 60, '1' * 40, '!' * 40, '你' * 40, 'é' * 40, ' a' * 40, 'word ' * 40]
# What expressions with nested quantifiers read for hours.
BOMBS = [c * 200 + end for c in 'aA1 .!\n\u2581_' for end in ('', 'x', '!', '\0')]


def texts(special: Iterable[str] = ()) -> list[str]:
  """Returns 202 texts, the same in every run, and several for each of the special tokens."""
  forms = [unicodedata.normalize(form, line) for line in _WORDS for form in ('NFD', 'NFKC')]
  out = [*_WORDS, *_WHITESPACE, *_MARKS, *_CONTROLS, *_CODE, *_LONG, *forms]
  special = [text for text in special if text]
  for token in special:
    out += [token, f'a{token}b', f'a {token} b', f' {token}', f'{token}  ', f'{token}{token}',
            token.upper(), token.lower(), token[:-1], token + '>']
  if special:
    out.append('a '.join(special))
    out.append(''.join(special[:8]) + ' end')
  return list(dict.fromkeys(out))
