"""Caption metrics in plain Python: BLEU, ROUGE-L and CIDEr-D as coco-caption computes them.

The numbers published for captioners come from coco-caption (Chen et al. 2015, arXiv:1504.00325). Its
tokenizer, its constants and its slips are kept on purpose, so that scores can be set side by side.
"""

import math
import re
from collections import Counter

ABBREVIATIONS = r"""
    adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd brig bros calif capt
    cf cie cmdr co col colo conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb
    fla fri ft ga gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lt ltd maj mar
    md messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn
    pfc ph ph\.d plc pres prof pty pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st
    ste supt sys tel tenn thu thurs tue tues univ va vs vt wed wis wisc wm wyo"""
STATES = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"     # only with a capital: "Ill." but "ill ."
BEFORE_DIGIT = "art ca figs? nos? op pp prop"              # only before a number: "no. 5" but "no ."
STARTERS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many
    More Now Once One Other Our She Since So Some Such That The Their Then There These They This We
    What When While Yet You"""                             # before these "b." is "b" and a full stop


def _token_pattern():
    """One branch per kind of token worth keeping; findall skips the punctuation that none matches."""
    def any_of(words):
        return "|".join(words.split())

    letter, number, q = r"[^\W\d_]", r"\d+(?:[.,:]\d+)*", "['’]"
    run = "(?:[\\w\u0300-\u036f]*(?<!_))"           # the rest of a word; combining accents are not \w
    clitic = rf"{q}(?i:[smd]|ll|re|ve)(?![^\W_])"
    end = rf"(?!\w|[/.-]\w|{clitic})"
    comma = r"(?:\.(?=[,;:]))?"                     # there any word keeps its period: "dogs., cats"
    part = r"[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*"
    starter = any_of(STARTERS + STARTERS.upper())
    return re.compile(rf"""
        # markup, addresses, brackets already spelled out, emoticons
        <[/!?]?[A-Za-z][^<>]*>
      | (?:https?://|www\.)[^\s"'<>(),]*[^\s"'<>().,;:!?]
      | [A-Za-z0-9][\w.+-]*@[A-Za-z0-9.@-]*[A-Za-z0-9@] | @[A-Za-z_]\w* | [#]{letter}+
      | (?i:-[lr][rsc]b-) | [<>]?[:;=]['o*-]?[()\[\]DPOop|](?!{q}?\w) | \^_\^
        # words that come apart: can|not, gon|na, 't|is, is|n't, dog|'s
      | (?i:can(?=not{end})|(?:gon|wan)(?=na{end})|got(?=ta{end})|(?:lem|gim)(?=me{end}))
      | {q}[tT](?=(?i:is|was)) | [A-Za-z]*[A-MO-Za-mo-z](?=[nN][`'’][tT])
      | (?!.{clitic})[A-HJ-XZn]{q}{letter}{{2,}}(?![\w-]) | [nN][`'’][tT] | {clitic} | {q}{q}
        # words with an apostrophe: 'em, '90s, c'mon, ma'am
      | {q}(?i:em|till?|cause|n{q}|[2-9]0s) | {q}n(?![\w-]) | {q}\d\d(?=\s|$)
      | (?i:c{q}mon|s{q}mores|e{q}er|ev{q}ry|li{q}l|nat{q}l|nor{q}easter)
      | (?i:ol|somethin){q}(?!{letter}{letter})
      | {letter}+[aeiouyAEIOUY](?!{clitic}){q}[aeiouA-Z]{letter}*
        # slashes, hyphens, o'clock, y'|all, AT&T
      | {part}(?:/{part}){{1,2}}
      | (?:[dolDOL]{q})?[^\W_][\w.,]*
        (?:-(?:[dolDOL]{q}(?=\w\w))?(?:(?:[A-Za-z]\.){{2,}}|[^\W_]{run}))+{comma}
      | [dolDOL]{q}[A-Za-z0-9]{{2,}} | [dljDLJ]{q} | [yY]{q}(?={letter})
      | (?:[A-Z]+[&+])+[A-Z]+ | (?:US|HK|[ACR])\$
        # abbreviations, acronyms, initials
      | (?=[A-Za-z.]{{2,7}}\.(?!{letter}))
        (?: (?i:{any_of(ABBREVIATIONS)})\. | (?:{any_of(STATES + " " + STATES.upper())})\.
          | (?i:{any_of(BEFORE_DIGIT)})\.(?=\s*\d) )(?!{letter})
      | {letter}\.(?:{letter}\.)+(?!{letter})
      | [A-Za-z]\.(?!{letter}|\s+(?:(?:{starter})(?:\s|$)|M[rs]\.))
        # words, numbers, symbols
      | {letter}{run}(?:[.!?]{letter}{run})*{comma} | \d+[.,:]{number}{comma} | \d{run}{comma}
      | (?:(?<!-)[+-])?(?:(?<!\.\.)\.|[,:])?{number}
      | [?!]{{2,}} | \*+ | [#]+ | @+ | _+ | << | >> | [$%&()+/<=>\\^{{|}}~\[\]¡-¿×÷•‰℀-⯿]
        """, re.VERBOSE)


TOKEN = _token_pattern()
SPELLED = str.maketrans({
    "\u00ad": None, **dict.fromkeys("–—―", " -- "), **dict.fromkeys("“”«»‘‛‹›", '"'),
    "…": " ... ", "£": " # ", "€": " $ ", "¤": " $ ", "¢": " cents ",
    "¼": " 1/4 ", "½": " 1/2 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "})
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
BRACKETS = str.maketrans({
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})


def tokenize(caption: str) -> list[str]:
    """The words coco-caption compares: "The dog's ball, isn't it?" -> the dog 's ball is n't it.

    Brackets stay, as -lrb- and the like: coco-caption lowers the case before it looks for -LRB-.
    """
    caption = re.sub("&(?:amp|lt|gt|quot|apos|nbsp);", lambda m: ENTITIES[m[0]], caption)
    caption = re.sub(r"’(?=(?i:[smdt]|ll|re|ve)\b)", "'", caption.translate(SPELLED))
    words = [word for word in TOKEN.findall(caption) if word.strip("'’")]
    return " ".join(words).translate(BRACKETS).lower().split()


def score(candidates: list[str], references: list[list[str]]) -> tuple[dict, dict]:
    """Score one caption per image against the reference captions of that image.

    Returns (corpus, per_image), a dict of floats and a dict of lists of floats, with Bleu_1 to Bleu_4 and
    ROUGE_L (0 to 1) and CIDEr (0 to 10). CIDEr weighs an n-gram by how few of these images it describes: it
    depends on the set, and is 0 for a single image.
    """
    words = [tokenize(caption) for caption in candidates]
    reference_words = [[tokenize(caption) for caption in captions] for captions in references]
    grams = [ngrams(w) for w in words]
    reference_grams = [[ngrams(w) for w in image] for image in reference_words]

    statistics = [bleu_statistics(*image) for image in zip(grams, reference_grams)]
    bleus = [bleu(s) for s in statistics]
    per_image = {f"Bleu_{n + 1}": [b[n] for b in bleus] for n in range(4)}
    per_image["ROUGE_L"] = [rouge_l(*image) for image in zip(words, reference_words)]
    cider = CiderScorer(reference_words)
    per_image["CIDEr"] = [cider.score([w], image)[0] for image, w in enumerate(words)]
    corpus = {name: sum(values) / len(values) for name, values in per_image.items()}
    total = [sum(column) for column in zip(*statistics)]       # BLEU is of the corpus, not a mean
    corpus.update((f"Bleu_{n}", value) for n, value in enumerate(bleu(total), 1))
    return corpus, per_image


def ngrams(words: list[str]) -> list[Counter]:
    """Four Counters: how often each n-gram occurs, n = 1 to 4."""
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, 5)]


def bleu_statistics(grams: list[Counter], references: list[list[Counter]]) -> list[int]:
    """The sums of BLEU for an image: matching n-grams (n = 1 to 4), all n-grams, length, reference length.

    Matches are clipped at the most that one reference has; of two equally close lengths the shorter counts.
    """
    length = grams[0].total()
    matched = [sum(min(count, max(r[n][gram] for r in references)) for gram, count in grams[n].items())
               for n in range(4)]
    closest = min((r[0].total() for r in references), key=lambda size: (abs(size - length), size))
    return [*matched, *(max(0, length - n) for n in range(4)), length, closest]


def bleu(statistics: list[int]) -> list[float]:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002); 1e-15 and 1e-9 are coco-caption's guard against 0/0."""
    matched, counted, (length, closest) = statistics[:4], statistics[4:8], statistics[8:]
    ratio = (length + 1e-15) / (closest + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(4):
        product *= (matched[n] + 1e-15) / (counted[n] + 1e-9)
        scores.append(product ** (1 / (n + 1)) * brevity)
    return scores


def rouge_l(words: list[str], references: list[list[str]]) -> float:
    """ROUGE-L (Lin 2004), beta 1.2; best precision and best recall may come from different references."""
    words = words or [""]                                      # its split(" ") finds one word in ""
    references = [reference or [""] for reference in references]
    common = [longest_common(words, reference) for reference in references]
    precision = max(common) / len(words)
    recall = max(length / len(reference) for length, reference in zip(common, references))
    if precision == 0:
        return 0.0
    return (1 + 1.2 ** 2) * precision * recall / (recall + 1.2 ** 2 * precision)


def longest_common(a: list, b: list) -> int:
    """Length of the longest common subsequence of two lists."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


class CiderScorer:
    """CIDEr-D (Vedantam et al. 2015), sigma 6: 10 x the mean over n and references of an image.

    references: for each image, its reference captions as token lists. An n-gram weighs its count times
    log(images / images with a reference that has it), which is counted once for any number of captions.
    """

    def __init__(self, references: list[list[list[str]]]):
        self.references = references
        frequency = Counter()
        for image in references:
            frequency.update({gram for words in image for counts in ngrams(words) for gram in counts})
        self.log_images = math.log(len(references))
        self.idf = {gram: self.log_images - math.log(count) for gram, count in frequency.items()}

    def score(self, captions: list[list[str]], image: int) -> list[float]:
        """CIDEr-D of each of these token lists as a caption of one image, given by its index."""
        references = [self._tf_idf(words) for words in self.references[image]]
        return [self._score(self._tf_idf(words), references) for words in captions]

    def _tf_idf(self, words):
        """Bigrams counted, as coco-caption measures length, and (vector, norm) for n = 1 to 4."""
        vectors = []
        for counts in ngrams(words):
            vector = {gram: count * self.idf.get(gram, self.log_images) for gram, count in counts.items()}
            vectors.append((vector, math.sqrt(sum(value * value for value in vector.values()))))
        return max(0, len(words) - 1), vectors

    def _score(self, candidate, references):
        total = 0.0
        for length, vectors in references:
            penalty = math.exp(-((candidate[0] - length) ** 2) / (2 * 6.0**2))
            for (a, a_norm), (b, b_norm) in zip(candidate[1], vectors):
                if a_norm and b_norm:
                    clipped = sum(min(a[gram], b[gram]) * b[gram] for gram in a if gram in b)
                    total += penalty * clipped / (a_norm * b_norm)
        return 10 * total / 4 / len(references)


class Reward:
    """CIDEr-D for training, of texts as captions of an image in `references`, {image: its captions}.

    N-grams weigh by how rare they are there. The end counts as a word: else a caption may win by stopping
    after "in a".
    """

    def __init__(self, references: dict[int, list[str]]):
        self.place = {image: place for place, image in enumerate(references)}
        self.scorer = CiderScorer([[self.words(text, True) for text in own] for own in references.values()])

    @staticmethod
    def words(text: str, ended: bool) -> list[str]:
        return tokenize(text) + ["."] * ended

    def __call__(self, image: int, texts: list[str], ended: list[bool]) -> list[float]:
        return self.scorer.score([self.words(*caption) for caption in zip(texts, ended)], self.place[image])
