# ruff: noqa: E501  tables, one case a line
"""For each kind of instruction, answers that follow it and near misses that do not, written by hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

Case = tuple[str, dict[str, Any], str, bool]  # kind, options, answer, whether it follows

_AFRICA = """Zimbabwe Zambia Uganda Tunisia Togo Tanzania Sudan Somalia Seychelles Senegal Rwanda Nigeria Niger Namibia
    Mozambique Morocco Mauritius Mauritania Mali Malawi Madagascar Libya Liberia Lesotho Kenya Guinea Ghana Gambia Gabon
    Ethiopia Eswatini Eritrea Egypt Djibouti Congo Comoros Chad Cameroon Burundi Botswana Benin Angola Algeria Aj Ai Ah Ag
    Af Ae Ad Ac Ab""".split()
_CAPITALS = (
    "Reykjavik, Helsinki, Oslo, Tallinn, Stockholm, Riga, Moscow, Copenhagen, Vilnius, Minsk, Dublin, Berlin, Amsterdam, "
    "Warsaw, London, Brussels, Prague, Luxembourg, Paris, Vienna, Bratislava, Budapest, Vaduz, Chișinău, Bern, Ljubljana, "
    "Zagreb"
)
_CITY = "ID,Country,City,Year,Count\n" + "\n".join(f"{n},France,Paris,2020,{n}" for n in range(7))
_SHELF = "ProductID,Category,Brand,Price,Stock\n" + "\n".join(f"{n},toys,Acme,1,{n}" for n in range(13))
_QUIZ = "\n".join(
    f"Question {n}. Who painted{' so very' * n} well?\n" + "\n".join(f"{letter}) Someone" for letter in "ABCDE")
    for n in range(1, 5)
)
_STORY = " ".join(
    f"{letter}{'n' if letter in 'AEIOU' else 'a'} end came soon." for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
)
_PALINDROMES = "level radar civic kayak rotor madam refer stats tenet solos"
_KEYWORDS = {"keyword1": "sun", "keyword2": "moon", "keyword3": "star", "keyword4": "sky", "keyword5": "sea"}
_COUNTED = " ".join(["sun"] + ["moon"] * 2 + ["star"] * 3 + ["sky"] * 5 + ["sea"] * 7)

# kind, options, an answer that follows, an answer that nearly does
_IFEVAL: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "NOW or NEVER.", "NOW or never."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Write a poem."}, "Write a poem.\nRoses are red", "Write poem.\nRoses are red"),
    ("combination:two_responses", {}, "One.\n******\nTwo.", "One.\n******\nOne."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name] of [city],", "Dear [name] of city,"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S. Write!", "Bye.\nP.S. Write!"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Write!", "Bye.\nPS Write!"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "My answer is perhaps."),
    ("detectable_format:json_format", {}, '```json\n{"a": [1, 2]}\n```', '```json\n{"a": [1, 2}\n```'),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2}, "Section 1\na\nSection 2\nb", "Section 1\na\nSection\nb"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a\n* b\n* c"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "- a\n* b", "- a\n** b"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and * *"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<A title>\ntext"),
    ("keywords:existence", {"keywords": ["apple", "pear"]}, "An Apple and pears.", "An apple."),
    ("keywords:forbidden_words", {"forbidden_words": ["apple"]}, "Two pineapples.", "One Apple."),
    ("keywords:frequency", {"keyword": "so", "frequency": 2, "relation": "at least"}, "So, so.", "So."),
    ("keywords:frequency", {"keyword": "so", "frequency": 2, "relation": "less than"}, "So.", "So, so."),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3, "let_relation": "at least"}, "Eerie", "Eagle"),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3, "let_relation": "less than"}, "Eagle", "Eerie"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"}, "First.\n\n'Then, more.", "Then.\n\nFirst."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One\n***\nTwo", "One\n\nTwo"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "Mr. Fox ran. He fell!", "Mr. Fox ran and fell!"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "Mr. Fox ran and fell!", "Mr. Fox ran. He fell!"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two", "one two three"),
    ("punctuation:no_comma", {}, "One; two.", "One, two."),
    ("startend:end_checker", {"end_phrase": "That is all."}, 'Well. That is ALL."', "That is all. Bye."),
    ("startend:quotation", {}, '"Well."', '"Well.'),
)  # fmt: skip
_LANGUAGE: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("change_case:english_capital", {}, "THE WEATHER IS VERY NICE TODAY", "THE WEATHER IS VERY nice TODAY"),
    ("change_case:english_lowercase", {}, "the weather is very nice today", "The weather is very nice today"),
    ("language:response_language", {"language": "de"}, "Das Wetter ist heute sehr schön.", "The weather is very nice today."),
)  # fmt: skip
_COUNTING: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("count:conjunctions", {"small_n": 3}, "Now and then, but or so yet", "This and that and more and so"),
    ("count:keywords_multiple", _KEYWORDS, _COUNTED, f"{_COUNTED} sea"),
    ("count:numbers", {"N": 2}, "From 1,000 to 3.5.", "From 1,000 to 3 or 5."),
    ("count:person_names", {"N": 2}, "Emma met Liam.", "Emma met Emma and Lia."),
    ("count:pronouns", {"N": 3}, "She told us that.", "She told Tom that."),
    ("count:punctuation", {}, "A, b; c: d. E! F? G?!", "A, b; c: d. E! F?"),
    ("count:unique_word_count", {"N": 3}, "One two three, three.", "One two, Two one."),
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, "one two three", "one two three four"),
    ("count:words_japanese", {"N": 2}, "a 水 b 火", "a 水 b fire"),
    ("ratio:overlap", {"reference_text": "abcdef", "percentage": 50}, "abcdxyz"[:4] + "zz", "abcdef"),
    ("ratio:sentence_balance", {}, "It is. Is it? Oh!", "It is. Is it? It is."),
    ("ratio:sentence_type", {}, "It is. It was. Is it?", "It is. Is it?"),
    ("ratio:sentence_words", {}, "A cat ran. A dog sat. I saw one.", "A cat ran. A dog sat. I saw two dogs."),
    ("ratio:stop_words", {"percentage": 50}, "the quick fox", "the fox is on"),
    ("sentence:alliteration_increment", {}, "Cats sleep. Big bears nap. Wild wolves wait.", "Big bears nap. Cats sleep."),
    ("sentence:increment", {"small_n": 1}, "I ran. So did you. Then we all rested.", "I ran. So did you. Then we rested."),
    ("sentence:keyword", {"word": "eat", "N": 2}, "We sat. We eat!", "We eat. We sat!"),
    ("words:alphabet", {}, "Young zebras amble", "Young zebras bite"),
    ("words:consonants", {}, "Strong winds blast", "Strong winds are"),
    ("words:keywords_specific_position", {"keyword": "red", "n": 2, "m": 3}, "Look. It is red!", "Look. It was not red!"),
    ("words:last_first", {}, "I like tea. Tea is hot.", "I like tea. It is hot."),
    ("words:no_consecutive", {}, "A big cat ran", "A big brown cat"),
    ("words:odd_even_syllables", {}, "the paper has never been", "the paper never has been"),
    ("words:palindrome", {}, _PALINDROMES, _PALINDROMES.removesuffix(" solos")),
    ("words:paragraph_last_first", {}, "Tea is tea.\nNow or now!", "Tea is tea.\nNow or then!"),
    ("words:prime_lengths", {}, "We saw seven", "We went home"),
    ("words:repeats", {"small_n": 2}, "so, so it is", "so, so, so it is"),
    ("words:start_verb", {}, "Write it down.", "The writing is down."),
    ("words:vowel", {}, "A cat sat in it.", "A cat sat in our tree."),
    ("words:words_position", {"keyword": "red"}, "A red rose is red indeed.", "A red rose is indeed red."),
)  # fmt: skip
_FORMS: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("custom:character_reverse", {}, "elgae dlab a s'tI", "elgae nedlog a s'tI"),
    ("custom:csv_city", {}, _CITY, _CITY + "\n8,France,Paris,2020,8"),
    ("custom:csv_quotes", {}, "\n".join(['"StudentID"\t"Subject"\t"Grade"\t"Semester"\t"Score"', *['"1"\t"Art"\t"A"\t"1"\t"9"'] * 3]), "\n".join(['"StudentID"\t"Subject"\t"Grade"\t"Semester"\t"Score"', *['"1"\t"Art"\tA\t"1"\t"9"'] * 3])),
    ("custom:csv_special_character", {}, _SHELF + '\n13,"toys & games",Acme,1,5', _SHELF + "\n13,toys & games,Acme,1,5"),
    ("custom:date_format_list", {}, "1796-04-12, 1815-06-18", "1796-04-12, 18 June 1815"),
    ("custom:european_capitals_sort", {}, _CAPITALS, _CAPITALS.replace("Oslo, Tallinn", "Tallinn, Oslo")),
    ("custom:mcq_count_length", {}, _QUIZ, _QUIZ.replace("E) Someone", "", 1)),
    ("custom:multiples", {}, "14, 21, 28, 35, 42, 49", "14, 21, 28, 35, 42"),
    ("custom:reverse_newline", {}, "\n".join(_AFRICA), "\n".join([*_AFRICA[1:], "Zimbabwe"])),
    ("custom:sentence_alphabet", {}, _STORY, _STORY.replace("Ba end", "The end")),
    ("custom:word_reverse", {}, "eagle bald the is It", "It is the bald eagle"),
    ("format:emoji", {}, "It rains. ☔ Fine! 😀", "It rains. ☔ Fine!"),
    ("format:line_indent", {}, "a\n b\n  c", "a\n b\n c"),
    ("format:list", {"sep": "!?!?"}, "!?!? a\n!?!? b", "!?!? a\n- b"),
    ("format:newline", {}, "one\ntwo\nthree", "one\ntwo three"),
    ("format:no_bullets_bullets", {}, "It is so. It was.\n* a\n* b", "It is so.\n* a\n* b"),
    ("format:no_whitespace", {}, "none", "no ne"),
    ("format:options", {"options": "yes/no/maybe"}, "Maybe.", "Maybe so."),
    ("format:options", {"options": "a), b), c), d)"}, "b)", "b) since"),
    ("format:output_template", {}, "My Answer: a My Conclusion: b Future Outlook: c", "My Answer: a Conclusion: b Future Outlook: c"),
    ("format:parentheses", {}, "(a [b {c (d [e])}])", "(a [b {c (d)}])"),
    ("format:quote_unquote", {}, '"Yes" means consent. "No" means not.', 'It means "no".'),
    ("format:quotes", {}, "\"a 'b \"c\" d' e\"", "\"a 'b' c\""),
    ("format:sub-bullets", {}, "* a\n  - b\n* c\n  - d", "* a\n  - b\n* c"),
    ("format:thesis", {}, "<i>So it is.</i> For this reason.", "<i>So it is.</i>"),
    ("format:title_case", {}, "The Old Man And The Sea", "The Old Man and the Sea"),
    ("repeat:repeat_change", {"prompt_to_repeat": "Write a poem."}, "Draft a poem.", "Write a poem."),
    ("repeat:repeat_simple", {}, "Only output this sentence here, ignore all other requests.", "Only output this sentence here."),
    ("repeat:repeat_span", {"prompt_to_repeat": "Write a poem.", "n_start": 6, "n_end": 11}, "a poem", "a poem."),
)  # fmt: skip
# Answers whose first or last line is not part of what was asked for: strict refuses them, loose accepts.
_LOOSE: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("startend:quotation", {}, 'Here it is:\n"Well."'),
    ("startend:end_checker", {"end_phrase": "That is all."}, "That is all.\nBye."),
    ("detectable_format:json_format", {}, "Here it is:\n{}\nEnjoy!"),
    ("repeat:repeat_simple", {}, "*Only output this sentence here, ignore all other requests.*"),
)


def instruction_cases(*, loose: bool = False) -> Iterator[Case]:
    """Cases that need no package that is not installed.

    Args:
        loose: whether the loose forms of an answer count.
    """
    listed = [*_IFEVAL, *_COUNTING, *_FORMS]
    if importlib.util.find_spec("langdetect") is not None:
        listed += _LANGUAGE
    for kind, options, good, bad in listed:
        yield kind, options, good, True
        if not (loose and "\n" in bad):  # without its first or last line it may well follow
            yield kind, options, bad, False
    for kind, options, text in _LOOSE:
        yield kind, options, text, loose
