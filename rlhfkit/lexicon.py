"""The words of the reviews: what is reviewed and in which aspects, the opinion words with their valence, whole phrases.

Within each list the first words are the most frequent (see ``grammar.word_weights``). A word belongs to one list only,
so that its meaning never depends on where it stands.
"""

from __future__ import annotations

DOMAINS = ("film", "product")

ITEMS = {
    "film": (
        "comedy thriller drama western musical documentary romance cartoon sequel biopic mystery satire "
        "fantasy melodrama parody remake tragedy trilogy whodunit prequel"
    ),
    "product": (
        "phone laptop camera kettle lamp toaster printer keyboard speaker backpack heater watch "
        "blender router tripod bicycle mattress drill tent freezer"
    ),
}
MODIFIERS = {
    "film": "french recent classic silent low-budget bollywood famous",
    "product": "cheap used small portable wireless foldable refurbished",
}
ASPECTS = {
    "film": (
        "plot acting ending dialogue music cast script pacing photography editing humour opening "
        "soundtrack wardrobe direction lighting narration suspense choreography title atmosphere premise tone finale"
    ),
    "product": (
        "battery price design screen packaging manual quality delivery size weight cable warranty "
        "finish setup handle software charger coating grip motor sound display fabric colour"
    ),
}

# adjectives by valence; those of one domain are used there only
ADJECTIVES = {
    2: {
        "both": "excellent wonderful superb outstanding perfect amazing",
        "film": "brilliant gripping moving hilarious unforgettable masterful",
        "product": "flawless ingenious luxurious rock-solid effortless first-class",
    },
    1: {
        "both": "good nice fine decent pleasant solid",
        "film": "clever charming funny lively touching stylish",
        "product": "sturdy reliable handy quiet practical neat",
    },
    -1: {
        "both": "bad weak poor disappointing mediocre dull",
        "film": "slow predictable boring flat clumsy noisy",
        "product": "flimsy overpriced bulky fragile confusing sluggish",
    },
    -2: {
        "both": "terrible awful horrible dreadful appalling hopeless",
        "film": "unwatchable idiotic ridiculous insulting lifeless painful",
        "product": "useless defective worthless dangerous unusable broken",
    },
}
INTENSIFIERS = "very really so truly quite extremely"
COPULAS = "was seemed felt"

# opening sentences: every verb can meet every time, and some end with a companion
OPENING_VERBS = {"film": "watched saw rented streamed", "product": "bought tried ordered unpacked"}
OPENING_TIMES = ("yesterday", "last week", "last month", "in may", "in december", "on sunday", "in spring", "by chance")
OPENING_ENDS = (".", "with my sister .", "with a friend .", "for my father .", "on a whim .", "after work .")

# closing sentences by the sign of the balance, with the valence of the word that decides
CLOSINGS = {
    1: (
        "overall i loved it .",
        "i would recommend it to anyone .",
        "i would gladly do it again .",
        "five stars from me .",
        "it made my day .",
        "thank you to all who made it .",
        "what a joy .",
    ),
    0: (
        "overall it left me undecided .",
        "i have mixed feelings about it .",
        "it has two sides .",
        "three stars from me .",
        "you may see it otherwise .",
    ),
    -1: (
        "overall i hated it .",
        "i would not recommend it to anyone .",
        "i regret the whole thing .",
        "one star from me .",
        "it ruined my evening .",
        "shame on all who made it .",
        "what a waste .",
    ),
}
CLOSING_VALENCE = {
    "loved": 2,
    "recommend": 1,
    "gladly": 1,
    "joy": 2,
    "hated": -2,
    "regret": -1,
    "ruined": -2,
    "waste": -2,
}


def adjective_valences(domain: str) -> dict[str, int]:
    """Valence of every adjective used in a domain: 2, 1, -1 or -2, in the order of frequency."""
    return {
        word: valence
        for valence, groups in ADJECTIVES.items()
        for word in (groups["both"] + " " + groups[domain]).split()
    }


VALENCE: dict[str, int] = {**adjective_valences("film"), **adjective_valences("product"), **CLOSING_VALENCE}
