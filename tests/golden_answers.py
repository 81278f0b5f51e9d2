r"""Pairs of (right answer, boxed answer) with the verdict they must get, where each is from, and why.

Sources: "MATH" a form that golds of the MATH data set have; "AIME" of circulating AIME files; "math-verify" a case that
math-verify 0.9.0 gets wrong or cannot say, found by running it; "attack" what a policy may find; "text" what tokenizers
and decoders emit. Every pair is checked in both directions.
"""

from typing import NamedTuple


class Golden(NamedTuple):
    gold: str
    box: str
    verdict: str
    source: str
    why: str


CORRECT, WRONG = "correct", "wrong"

PAIRS = [
    # integers
    Golden("204", "204", CORRECT, "AIME", "the same integer"),
    Golden("025", "25", CORRECT, "AIME", "leading zeros have no meaning"),
    Golden("204", "205", WRONG, "AIME", "another integer"),
    Golden("204", "-204", WRONG, "AIME", "the sign counts"),
    Golden("-5", "−5", CORRECT, "text", "U+2212 is how a minus is typeset"),
    Golden("336^\\circ", "336", CORRECT, "AIME", "the unit is the question's; a key with it circulates"),
    Golden("204", "204^{\\circ}", CORRECT, "AIME", "likewise in the response"),
    Golden("204", "204.", CORRECT, "math-verify", "a full stop inside the box; math-verify: text, wrong"),
    Golden("204", "204.0", CORRECT, "MATH", "equal numbers"),
    Golden("204", "$204$", CORRECT, "text", "math mode has no meaning"),
    Golden("204", "\\text{204}", CORRECT, "MATH", "a font has no meaning"),
    Golden("204", "12\\cdot 17", CORRECT, "MATH", "equal; simplification is not what is asked"),
    Golden("204", "m+n=204", CORRECT, "AIME", "the value that the question asks for, named"),
    Golden("1", "9=1", WRONG, "math-verify", "false; math-verify takes the right side of any equation"),
    Golden("1", "2x+z=1", WRONG, "math-verify", "an equation is no number; likewise"),
    Golden("204", "204,205", WRONG, "attack", "two answers are none"),
    Golden("204", "204\\text{ or }205", WRONG, "attack", "two answers are none"),
    Golden("204205", "204,205", CORRECT, "MATH", "thousands separators"),
    Golden("1,234", "1234", CORRECT, "MATH", "thousands separators"),
    Golden("1234", "1{,}234", CORRECT, "MATH", "TeX's way to write them"),
    Golden("\\$32,\\!500", "32500", CORRECT, "MATH", "MATH's way to write them"),
    Golden("1234", "1\\,234", CORRECT, "math-verify", "thin space as separator; math-verify: 1 + 234"),
    Golden("1000", "10^3", CORRECT, "MATH", "equal"),
    Golden("3628800", "10!", CORRECT, "MATH", "equal"),
    Golden("12345678901234567890", "12345678901234567891", WRONG, "MATH", "integers are exact at any size"),
    Golden("42", "٤٢", WRONG, "text", "Arabic-Indic digits: int() reads them, an ASCII key is asked for"),
    Golden("42", "４２", WRONG, "text", "full-width digits likewise"),
    Golden("42", "4²", WRONG, "text", "isdigit() holds of a superscript"),
    Golden("42", "4\x002", WRONG, "text", "a NUL byte is no digit and does not end a string"),
    Golden("42", "42\ud800", WRONG, "text", "a lone surrogate"),
    Golden("42", "forty-two", WRONG, "text", "words are not read"),
    Golden("7", "7, 7", WRONG, "math-verify", "two answers; math-verify: the set of them is {7}"),
    Golden("6", "4 2", WRONG, "math-verify", "two numbers; math-verify adds them"),
    Golden("0", "70 .0", WRONG, "math-verify", "two numbers; math-verify multiplies them"),
    Golden("0", "\\frac{0}{0}", WRONG, "attack", "no number"),
    Golden("204", "204\\\\!!", WRONG, "attack", "a factorial after a line break; math-verify drops it"),
    Golden("-5", "-5_{77}", WRONG, "attack", "a numeral in a base that none is asked for in"),
    Golden("1234", "1 234", CORRECT, "math-verify", "space as separator; math-verify: 1 + 234"),
    Golden("42", "42_07", WRONG, "math-verify", "no base; math-verify drops what follows"),
    # fractions, decimals, percent
    Golden("\\frac34", "0.75", CORRECT, "MATH", "equal; \\frac34 without braces must parse"),
    Golden("\\frac 1 2", "0.5", CORRECT, "MATH", "TeX takes single digits"),
    Golden("\\frac{3}{4}", "3/4", CORRECT, "MATH", "equal"),
    Golden("\\dfrac{7}{2}", "3\\frac12", CORRECT, "MATH", "mixed number"),
    Golden("\\frac{3}{2}", "3\\frac12", WRONG, "MATH", "a mixed number is a sum"),
    Golden("\\frac{1}{3}", "0.33", WRONG, "MATH", "not equal"),
    Golden("\\frac{1}{3}", "0.333333", CORRECT, "math-verify", "kept: rounded to six decimals counts as equal"),
    Golden("11.2", "11\\frac15", CORRECT, "MATH", "equal"),
    Golden("70\\%", "70", CORRECT, "math-verify", "asked in percent; math-verify parses no percent in a box"),
    Golden("0.7", "70\\%", CORRECT, "math-verify", "equal"),
    Golden("70\\%", "7", WRONG, "MATH", "neither 0.7 nor 70"),
    Golden("\\frac23", "2:3", CORRECT, "MATH", "a ratio"),
    # surds, constants, symbols
    Golden("\\sqrt{8}", "2\\sqrt2", CORRECT, "MATH", "equal"),
    Golden("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", CORRECT, "MATH", "equal"),
    Golden("\\pi", "3.14", WRONG, "MATH", "not equal"),
    Golden("\\sin 30^\\circ", "\\frac12", CORRECT, "math-verify", "degrees; math-verify reads 30 radians"),
    Golden("\\log_2 8", "3", CORRECT, "MATH", "equal"),
    Golden("x^2-1", "(x-1)(x+1)", CORRECT, "MATH", "equal"),
    Golden("x^2+1", "y^2+1", WRONG, "MATH", "another variable"),
    Golden("3t", "3", WRONG, "math-verify", "t is a variable; math-verify drops it as a unit"),
    Golden("a + b + c", "a + b", WRONG, "math-verify", "likewise: both become 'a +'"),
    Golden("a + b + c", "c+b+a", CORRECT, "math-verify", "likewise, and then compares text"),
    Golden("1+2i", "2i+1", CORRECT, "MATH", "equal"),
    Golden("1+2i", "1-2i", WRONG, "MATH", "the conjugate"),
    Golden("y=2x+1", "2x+1", CORRECT, "MATH", "the name of the value may be left out"),
    Golden("x=5", "5", CORRECT, "MATH", "likewise"),
    Golden("x=5", "y=5", WRONG, "MATH", "another variable"),
    Golden("\\infty", "-\\infty", WRONG, "MATH", "the sign counts"),
    # intervals, inequalities
    Golden("[0,1)", "[0,1)", CORRECT, "MATH", "the same"),
    Golden("[0,1]", "[0,1)", WRONG, "MATH", "an end point counts"),
    Golden("(0,1)", "[0,1]", WRONG, "MATH", "both do"),
    Golden("[2,\\infty)", "x\\ge 2", CORRECT, "math-verify", "equal; math-verify: only with the inequality as gold"),
    Golden("(1,2)", "1<x<2", CORRECT, "math-verify", "likewise"),
    Golden("x\\in[0,1]", "[0,1]", CORRECT, "MATH", "the name may be left out"),
    Golden("(-\\infty,2)\\cup(3,\\infty)", "(3,\\infty)\\cup(-\\infty,2)", CORRECT, "MATH", "a union has no order"),
    # tuples, sets, lists
    Golden("(4,-2,3)", "(4,-2,3)", CORRECT, "MATH", "math-verify needs the box to parse it"),
    Golden("(3,4,5)", "(5,4,3)", WRONG, "MATH", "order counts"),
    Golden("(3,4,5)", "3,4,5", CORRECT, "MATH", "brackets left out"),
    Golden("(3,4,5)", "5,4,3", WRONG, "MATH", "order still counts"),
    Golden("\\{1,2,3\\}", "\\{3,2,1\\}", CORRECT, "MATH", "a set has no order"),
    Golden("1,2", "2,1", CORRECT, "MATH", "a list of solutions has no order"),
    Golden("\\{1,2\\}", "1,2", CORRECT, "MATH", "braces left out"),
    Golden("\\{1,2\\}", "(1,2)", WRONG, "math-verify", "a set is no point; math-verify: equal"),
    Golden("1,2", "1", WRONG, "attack", "a part of the solutions"),
    Golden("\\pm 2", "2,-2", CORRECT, "MATH", "two values"),
    Golden("\\pm 2", "2", WRONG, "attack", "one of them"),
    Golden("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\ 2\\end{pmatrix}", CORRECT, "MATH", "spaces"),
    Golden("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2\\\\1\\end{pmatrix}", WRONG, "MATH", "order"),
    # units, bases, money, words
    Golden("5\\text{ cm}", "5", CORRECT, "MATH", "the question names the unit"),
    Golden("5\\text{ cm}", "5 cm", CORRECT, "MATH", "a unit without \\text"),
    Golden("5\\text{ cm}", "5\\text{ m}", WRONG, "math-verify", "another unit; math-verify drops both"),
    Golden("5\\text{ cm}^2", "5\\text{ cm}^3", WRONG, "math-verify", "area is no volume"),
    Golden("9\\text{ a.m.}", "9\\text{ p.m.}", WRONG, "math-verify", "likewise"),
    Golden("12\\text{ square units}", "12", CORRECT, "MATH", "the question names the unit"),
    Golden("18.90", "\\$18.90", CORRECT, "MATH", "money"),
    Golden("120_7", "120", CORRECT, "MATH", "the question names the base"),
    Golden("120_7", "120_{8}", WRONG, "math-verify", "another base; math-verify drops it"),
    Golden("\\text{Tuesday}", "Tuesday", CORRECT, "MATH", "a font has no meaning"),
    Golden("\\text{Tuesday}", "\\text{Monday}", WRONG, "MATH", "another word"),
    Golden("\\text{east}", "\\text{seat}", WRONG, "MATH", "letters are no product"),
    Golden("\\text{(A)}", "A", CORRECT, "MATH", "a choice"),
    Golden("\\text{(A)}", "B", WRONG, "MATH", "another one"),
]  # fmt: skip

# (response, gold, verdict, box, why): what is taken for the answer.
RESPONSES = [
    ("The answer is 204.", "204", "no_box", None, "only a box counts; math-verify takes the last number"),
    ("\\boxed{204", "204", "no_box", None, "never closed"),
    ("\\boxed{204} and \\boxed{205", "204", "no_box", None, "the last one counts, and it never closes"),
    ("\\boxed{204} … \\boxed{205}", "204205", "wrong", "205", "math-verify joins neighbouring boxes to 204205"),
    ("\\boxed{204} … \\boxed{205}", "205", "correct", "205", "the last one counts"),
    ("\\boxed{205} … \\boxed{204}", "205", "wrong", "204", "the last one counts"),
    ("\\boxed{\\boxed{204}}", "204", "correct", "204", "nested: the inner one"),
    ("\\boxed{\\frac{1}{2}}", "\\frac12", "correct", "\\frac{1}{2}", "braces are matched"),
    ("\\boxed{}", "204", "wrong", "", "an empty box is an answer, and wrong"),
    ("\\boxed{ }", "204", "wrong", " ", "likewise"),
    ("\x00" * 50 + "\\boxed{204}\x00", "204", "correct", "204", "NUL bytes around the box"),
    ("\ud800\\boxed{204}\udfff", "204", "correct", "204", "lone surrogates around it"),
    ("é" * 4096, "204", "no_box", None, "4 kB of nonsense"),
]
