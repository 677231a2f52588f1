"""Text to token ids and back: a model's tokenizer, its end tokens, and its chat template.

Three things make this longer than one call of the tokenizers package. What a user writes must stay
text, even if it looks like a control token ("<|im_end|>"). A chat template is a program by somebody
else. And a streamed character may need several tokens.
"""
import functools
import os
import re
import secrets
import time

from tokenizers import AddedToken, Tokenizer

from common import UserError, check_number, read_json, read_text, reading
from model import find_folder


# ------------------------------------------------------------------------------------- text to ids

# A random number. No text contains it, not even a text written to attack us.
SECRET = secrets.token_hex(16)

# What stands in a chat template for other texts while we render it.
USER = f"user{SECRET}"          # for the user's text
PAST = f"past{SECRET}"          # for an earlier one
REPLY = f"reply{SECRET}"        # for a reply: what an answer is called in a chat

BRACKETED = re.compile(r"<.+>|\[.+\]", re.DOTALL)               # <think>, [INST], <|im_start|>


class Text:
    """The text side of a model's folder: its tokenizer, end tokens and chat template.

    The begin token (BOS) stands before a text, an end token (EOS) ends an answer.

        text = Text("tiny")
        text.encode("Once upon")        [0, 48, 1700, 605]      0 is the begin token <|begin|>
        text.decode([48, 1700, 605])    "Once upon"
        text.end                        {1}                     the ids that end an answer
        text.turn("Who was it?")        the ids of a turn in a chat
    """

    def __init__(self, path):
        self.folder = find_folder(path)
        self.tokenizer, self.file = load_tokenizer(self.folder)
        with reading(self.file, "used as a tokenizer"):
            # The begin token, if there is one, is what the post-processor puts before a text.
            probe = self.tokenizer.encode("a")
            self.begin = probe.ids[:probe.special_tokens_mask.index(0)]
            self.hide_control_tokens()
        self.end = end_tokens(self.folder)

    def encode(self, text, begin=True, control=False):
        """The token ids of a text. Strings like "<|end|>" in it are text.

        begin:    put the begin token first, if the tokenizer asks for one and it is not there yet
        control:  strings like "<|end|>" are control tokens: for texts that no user has written
        """
        if control:
            text = self.with_secret_names(text)
        # `plain` is the tokenizer with secret names for control tokens (see the next passage).
        with reading(self.file, "used on this text"):           # for instance a lone surrogate
            ids = self.plain.encode(text, add_special_tokens=False).ids
        for name in self.names:
            # Unigram models have </s> in the vocabulary itself, where we cannot hide it.
            if name in text and self.plain.token_to_id(name) in ids:
                raise UserError(f"{self.file} cannot encode {name} as text: it always becomes the "
                                "control token")
        ids = [self.own_ids.get(token, token) for token in ids]
        if begin and ids[:len(self.begin)] != self.begin:       # some chat templates print it
            ids = self.begin + ids
        return ids

    def decode(self, ids):
        """The text of ids, without special tokens."""
        with reading(self.file, "used to decode tokens"):       # some decoders panic
            return self.tokenizer.decode(ids, skip_special_tokens=True)

    # ------------------------------------------------- text is text (skip at first reading)
    #
    # A tokenizer turns the string "<|end|>" into its control token wherever it stands. In a user's
    # text it must not: a document could end a turn of the chat and forge the next one. So we encode
    # with a copy of the tokenizer, `plain`, where control tokens have secret names. With the
    # bundled model (66 is "a", 1 is <|end|>) and the secret 7f3c:
    #
    #     text            tokenizer     plain
    #     "a<|end|>"      [66, 1]       [66, 29, 93, 602, 93, 31]     a < | end | >
    #     "a<7f3c:1>"     text          [66, 1]
    #
    # Where we want a control token, we write its secret name. Still in one piece: a text without
    # control tokens gets the same ids from both.

    def hide_control_tokens(self):
        """Make `plain`, the secret `names` of control tokens, and what `plain`'s ids mean."""
        self.plain = Tokenizer(self.tokenizer.model)            # shares the vocabulary
        self.plain.normalizer = self.tokenizer.normalizer
        self.plain.pre_tokenizer = self.tokenizer.pre_tokenizer
        self.special = set()        # ids that decode leaves out
        self.names = {}             # "<|end|>" -> its secret name
        self.own_ids = {}           # id in plain -> id in tokenizer, where they differ
        for token_id, token in sorted(self.tokenizer.get_added_tokens_decoder().items()):
            name = token.content
            if token.special:
                self.special.add(token_id)
            # Qwen3's <think> and <tool_call> control the model but are not flagged as special.
            # Added tokens of another look are text: runs of spaces, rare letters.
            control = token.special or BRACKETED.fullmatch(name)
            if control:
                name = f"<{SECRET}:{token_id}>"
                self.names[token.content] = name
            self.plain.add_tokens([AddedToken(
                name, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
                normalized=token.normalized and not control)])
            self.own_ids[self.plain.token_to_id(name)] = token_id
        # At one place the longest control token counts, as in the tokenizer. (?!) matches nothing.
        longest_first = sorted(self.names, key=len, reverse=True)
        self.control_strings = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def with_secret_names(self, text):
        """text with each control token under its secret name, so that `plain` recognizes it."""
        return self.control_strings.sub(lambda found: self.names[found[0]], text)

    # ----------------------------------------------------------- chat turns (skip at first reading)
    #
    # A chat template prints a whole conversation. The cache holds the conversation already, so a
    # further turn is only what the template adds, and we must find where that begins. Looking for
    # the reply in the text would fail: a user may repeat it, and some templates drop a reply's
    # thoughts. Instead we render marks that stand nowhere else. For the line "Why?" after a reply:
    #
    #     rendered    <|user|>PAST<|end|><|assistant|>REPLY<|end|><|user|>USER<|end|><|assistant|>
    #     the turn                                         <|end|><|user|>Why?<|end|><|assistant|>
    #
    # What follows REPLY is the turn. There the template's control tokens get their secret names,
    # and only then the user's text takes the place of USER.

    def turn(self, content, replies=0, last=None):
        """The ids of a user's turn, up to where the model's reply begins.

        replies: how many replies came before; after none, the turn is the whole conversation.
        last: the last id of the reply before this turn, which is not in the cache yet.
        """
        text = self.insert(content, replies)
        if last is None:
            return self.encode(text)
        # A reply that the model has ended is not ended twice: the template's end token stands for
        # the model's own, together with what the template prints before it (Llama 2: a space).
        ids = self.encode(text.lstrip(), begin=False)
        if last in self.end and self.end.intersection(ids[:1]):
            return ids
        return [last] + self.encode(text, begin=False)

    def insert(self, content, replies):
        """The text of a user's turn, with secret names for the template's own control tokens."""
        # USER takes the place of the text, but not of the spaces around it, since a template may
        # trim those: of " Why? " we render " USER ".
        core = content.strip()
        marked = self.render_turn(content.replace(core, USER, 1), replies)
        # Does the template do with USER what it does with the text itself?
        if marked.replace(USER, core) != self.render_turn(content, replies):
            raise UserError(f"{self.folder}: the chat template changes the text it is given: we "
                            "cannot tell the text's strings from its own control tokens")
        return self.with_secret_names(marked).replace(USER, core)

    def render_turn(self, content, replies):
        """What a user's turn adds to the rendered text of a conversation with so many replies."""
        messages = [dict(role="user", content=PAST), dict(role="assistant", content=REPLY)]
        text = self.chat([*messages * replies, dict(role="user", content=content)])
        # The last reply is where the turn begins. Without one, rpartition returns the whole text.
        before, reply, added = text.rpartition(REPLY)
        if replies and not reply:
            raise UserError(f"{self.folder}: the chat template does not print the replies it is "
                            "given, so a chat cannot go on after the first one")
        return added

    def chat(self, messages):
        """A conversation as text, up to where the model's next reply begins, by the template.

        Whatever a template raises, dividing by zero or recursing, becomes one line, and so does
        printing without end. It runs in this process: one that loops without printing, or builds a
        huge string first, takes its time and memory. Ctrl-C ends it.
        """
        limit = 2**20 + 4 * sum(len(message["content"]) for message in messages)
        parts = []
        size = 0
        with reading(f"{self.folder}: the chat template", "rendered"):
            for part in self.template.generate(messages=messages, add_generation_prompt=True):
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise ValueError(f"it prints more than {limit:,} characters")
        return "".join(parts)

    @functools.cached_property
    def template(self):
        """The folder's chat template, compiled, with the special tokens that it may print."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment    # it is code from the folder
        settings = read_json(os.path.join(self.folder, "tokenizer_config.json"), required=False)
        tokens = {}                             # what the template may print, such as bos_token
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = settings.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                tokens[name] = token
        source = self.template_source(settings)
        # The environment that transformers gives to templates.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

        def raise_exception(message):           # what a template calls to refuse a conversation
            raise ValueError(message)

        with reading(f"{self.folder}: the chat template", "compiled"):
            return environment.from_string(source, globals=dict(
                tokens, raise_exception=raise_exception, strftime_now=time.strftime))

    def template_source(self, settings):
        """The chat template from its own file, or from tokenizer_config.json."""
        file = os.path.join(self.folder, "chat_template.jinja")
        if os.path.lexists(file):
            return read_text(file)
        source = settings.get("chat_template")
        if isinstance(source, list):            # several, by name
            default = [entry.get("template") for entry in source
                       if isinstance(entry, dict) and entry.get("name") == "default"]
            source = default[0] if default else None
        if not isinstance(source, str) or not source:
            raise UserError(f"{self.folder} has no chat template, neither chat_template.jinja nor "
                            "one in tokenizer_config.json")
        return source


def load_tokenizer(folder):
    """(Tokenizer, its file): a folder's tokenizer.json, without the truncation saved with some."""
    file = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(file) and os.path.exists(os.path.join(folder, "tokenizer.model")):
        raise UserError(f"{folder} has tokenizer.model but no tokenizer.json; to convert it, call "
                        "transformers' AutoTokenizer.from_pretrained(folder).save_pretrained"
                        "(folder)")
    with reading(file, "read as a tokenizer"):
        tokenizer = Tokenizer.from_str(read_text(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, file


def end_tokens(folder):
    """The union of the end tokens that a folder's files name: a chat model often has two."""
    end = set()
    for name in ("config.json", "generation_config.json"):
        file = os.path.join(folder, name)
        tokens = read_json(file, required=False).get("eos_token_id")
        if tokens is None:
            continue
        if not isinstance(tokens, list):
            tokens = [tokens]
        for token in tokens:
            end.add(check_number(file, "eos_token_id", token, 0, 2**31 - 1, whole=True))
    return end


# ------------------------------------------------------------------ ids to text, while they come

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """Text out of a growing list of ids: `push` returns what no later token can change.

    Together the pieces are exactly text.decode(ids). The difficulty is a character in several
    tokens. An emoji is the bytes F0 9F 98 80, and a model may write F0 9F 98 first:

        id     waiting     decode(waiting)     push returns
        501    501         "�"                 ""               half a character: we wait
        129    501 129     "😀"                 "😀"
        262    262         " the"              " the"

    continues: other text stands before. Then a first space stays, which some decoders drop at the
    beginning of a text.
    """

    def __init__(self, text, continues=False):
        self.text = text
        self.waiting = []           # ids whose text was not returned yet
        self.before = []            # a token of text before those, as a context for decode
        if continues:
            self.before = text.encode("a", begin=False)[-1:]

    def push(self, token):
        """Add a token; return the text that is now certain, often that of the token."""
        string = self.text.tokenizer.id_to_token(token)
        if string is None or token in self.text.special:        # decode leaves it out
            return ""
        self.waiting.append(token)
        # Llama 2 and Mistral have a token for each byte, like <0xF0>. A single bad byte makes a
        # whole run of them unreadable, so nothing is certain before the run ends.
        if BYTE_TOKEN.fullmatch(string):
            return ""
        # A character has at most four bytes, so it is complete if the last four tokens end well.
        if self.text.decode(self.waiting[-4:]).endswith("\ufffd"):
            return ""
        return self.flush()

    def flush(self):
        """Return the text of the waiting tokens, of half a character the replacement character."""
        new = self.text.decode(self.before + self.waiting)[len(self.text.decode(self.before)):]
        self.before = self.waiting[-1:] or self.before
        self.waiting = []
        return new


def token_texts(text, ids):
    """The text of each token. What several tokens spell goes to the one that completes it."""
    stream = TextStream(text)
    texts = []
    for token in ids:
        piece = stream.push(token)
        if token in text.special:
            piece = text.tokenizer.id_to_token(token)
        texts.append(piece)
    texts[-1] += stream.flush()
    return texts
