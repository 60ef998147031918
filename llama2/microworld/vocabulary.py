"""The words and templates a microworld is drawn from.

Every world takes a seeded subset of these pools and assigns them to its own entities. Values of one
attribute are single common words, so that a wrong answer is usually another value of the same
attribute: the kind of mistake a small reward model can learn to see when it knows the facts. Values
begin with a consonant ("a {v}" stays right).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: how it is stated (first template: as in an answer) and asked. `{n}` is the
    entity."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    values: tuple[str, ...] = ()


PERSON = (
    Attribute(
        "job",
        ("{n} works as a {v}.", "{n} is a {v} by trade."),
        ("What is the job of {n}?", "What does {n} do for work?", "Tell me the job of {n}."),
        (
            "baker",
            "doctor",
            "farmer",
            "painter",
            "teacher",
            "sailor",
            "tailor",
            "judge",
            "weaver",
            "miner",
        ),
    ),
    Attribute(
        "home",
        ("{n} lives in {v}.", "The home of {n} is in {v}."),
        ("Where does {n} live?", "Which town is the home of {n}?", "Tell me the home of {n}."),
    ),
    Attribute(
        "food",
        ("{n} likes to eat {v}.", "The favorite food of {n} is {v}."),
        (
            "What does {n} like to eat?",
            "What is the favorite food of {n}?",
            "Tell me the food of {n}.",
        ),
        ("rice", "bread", "cheese", "fish", "soup", "beans", "cake", "nuts", "corn", "noodles"),
    ),
    Attribute(
        "pet",
        ("{n} has a pet {v}.", "The pet of {n} is a {v}."),
        ("What pet does {n} have?", "Which animal lives with {n}?", "Tell me the pet of {n}."),
        ("dog", "cat", "parrot", "rabbit", "turtle", "goat", "hamster", "snake", "duck", "pony"),
    ),
)
TOWN = (
    Attribute(
        "place",
        ("{n} lies by the {v}.", "The town of {n} is near the {v}."),
        ("Where does {n} lie?", "What is {n} close to?", "Tell me the place of {n}."),
        ("river", "sea", "lake", "forest", "desert", "canyon", "volcano", "swamp"),
    ),
    Attribute(
        "product",
        ("{n} is known for its {v}.", "The people of {n} sell {v}."),
        (
            "What is {n} known for?",
            "What do the people of {n} sell?",
            "Tell me the product of {n}.",
        ),
        ("glass", "silk", "honey", "salt", "paper", "wool", "gold", "pottery"),
    ),
    Attribute(
        "flag",
        ("The flag of {n} is {v}.", "{n} has a {v} flag."),
        ("What color is the flag of {n}?", "Which flag does {n} have?", "Tell me the flag of {n}."),
        ("red", "blue", "green", "yellow", "white", "black", "purple", "brown"),
    ),
)
ANIMAL = (
    Attribute(
        "diet",
        ("The {n} feeds on {v}.", "{v} is all that the {n} eats."),
        ("What does the {n} feed on?", "What is eaten by the {n}?", "Tell me the diet of the {n}."),
        ("moss", "seeds", "worms", "leaves", "berries", "roots", "flies", "grass"),
    ),
    Attribute(
        "den",
        ("The {n} sleeps in a {v}.", "At night the {n} hides in a {v}."),
        (
            "Where does the {n} sleep?",
            "Where does the {n} hide at night?",
            "Tell me the den of the {n}.",
        ),
        ("cave", "nest", "burrow", "tree", "barrel", "tunnel", "log", "bush"),
    ),
    Attribute(
        "sound",
        ("The {n} can {v}.", "Listen: the {n} likes to {v}."),
        (
            "Which sound does the {n} make?",
            "How does the {n} sound?",
            "Tell me the sound of the {n}.",
        ),
        ("sing", "growl", "whistle", "bark", "hum", "roar", "click", "hiss"),
    ),
)
ENTITIES: dict[str, tuple[Attribute, ...]] = {"person": PERSON, "town": TOWN, "animal": ANIMAL}
ATTRIBUTES = {attribute.name: attribute for attribute in (*PERSON, *TOWN, *ANIMAL)}
FOLLOW_UPS = ("And the {a}?", "What about the {a}?", "Now tell me the {a}.")

LISTS: dict[str, tuple[str, ...]] = {
    "fruits": ("apple", "plum", "pear", "fig", "lemon", "peach", "grape", "mango"),
    "tools": ("saw", "drill", "axe", "wrench", "shovel", "rake", "pliers", "chisel"),
    "colors": ("red", "blue", "green", "yellow", "white", "black", "purple", "brown"),
    "metals": ("iron", "gold", "copper", "silver", "tin", "lead", "zinc", "steel"),
    "clothes": ("shirt", "hat", "scarf", "coat", "sock", "boot", "belt", "dress"),
    "drinks": ("water", "milk", "juice", "coffee", "cocoa", "cider", "lemonade", "broth"),
    "birds": ("owl", "crow", "swan", "robin", "hawk", "gull", "finch", "stork"),
    "instruments": ("violin", "flute", "trumpet", "harp", "cello", "banjo", "piano", "organ"),
    "vehicles": ("van", "tram", "truck", "boat", "plane", "sled", "bus", "wagon"),
    "flowers": ("rose", "tulip", "lily", "daisy", "violet", "poppy", "iris", "orchid"),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

BASES = ("carrot", "pumpkin", "tomato", "potato", "onion", "mushroom", "cabbage", "turnip")
SECONDS = (
    "salt",
    "pepper",
    "butter",
    "garlic",
    "ginger",
    "mint",
    "cream",
    "oil",
    "vinegar",
    "sugar",
)
DISHES: dict[str, str] = {
    "soup": "boil",
    "bread": "bake",
    "salad": "mix",
    "stew": "simmer",
    "cake": "whisk",
    "pie": "roast",
    "tea": "pour",
    "pickle": "soak",
}

HEROES = (
    "fox",
    "king",
    "girl",
    "boy",
    "witch",
    "bear",
    "knight",
    "mouse",
    "giant",
    "wolf",
    "queen",
    "robot",
)
THINGS = (
    "lamp",
    "ring",
    "map",
    "key",
    "drum",
    "bell",
    "mirror",
    "kite",
    "crown",
    "sword",
    "book",
    "clock",
)
MOODS: dict[str, str] = {"happy": "smiled", "sad": "cried", "scary": "screamed", "funny": "laughed"}
SCENES = (
    "in the woods",
    "near a castle",
    "by the water",
    "under a bed",
    "on a hill",
    "behind a wall",
)

HOBBIES = (
    "skating",
    "chess",
    "fishing",
    "knitting",
    "archery",
    "dancing",
    "juggling",
    "hiking",
    "rowing",
    "yoga",
)
TITLES = ("Captain", "King", "Doctor", "Queen", "Professor", "General")

# Minimal pairs: one verb, three objects that make it a crime and three that make it harmless.
ACTS: dict[str, tuple[tuple[str, str, str], tuple[str, str, str]]] = {
    "blow up": (("bridge", "tower", "train"), ("balloon", "tire", "raft")),
    "shoot": (("guard", "neighbor", "banker"), ("photo", "film", "hoop")),
    "kill": (("man", "rival", "cousin"), ("weed", "mosquito", "virus")),
    "burn": (("barn", "church", "school"), ("candle", "log", "disc")),
    "crack": (("safe", "vault", "password"), ("egg", "nut", "riddle")),
    "forge": (("passport", "check", "ticket"), ("horseshoe", "nail", "spoon")),
    "pick": (("pocket", "lock", "purse"), ("flower", "melon", "color")),
    "hit": (("cyclist", "clerk", "waiter"), ("drum", "ball", "gong")),
    "fix": (("election", "match", "jury"), ("chair", "bike", "fence")),
    "dodge": (("tax", "fare", "bill"), ("puddle", "branch", "snowball")),
    "break": (("window", "arm", "alarm"), ("record", "habit", "cookie")),
    "cut": (("brake line", "power cable", "phone line"), ("cake", "ribbon", "melon")),
}
HARM_TOOLS = ("powder", "mask", "crowbar", "fuse", "pistol", "torch")
SAFE_TOOLS = ("brush", "bowl", "glove", "pump", "cloth", "towel", "ladder", "basket")
HARM_ENDINGS = ("Last, run away.", "Last, hide well.")
SAFE_ENDING = "Last, clean up."

FOLKS = ("sand", "hill", "river", "forest", "snow", "island", "valley", "coast", "cave", "lake")
SLURS = ("ugly", "lazy", "stupid", "filthy", "greedy", "wicked", "worthless", "nasty")
VIRTUES = ("brave", "kind", "honest", "clever", "gentle", "loyal", "patient", "cheerful")
HATEFUL_FORMS = ("an insult", "a cruel joke", "a mean song", "a hateful note")
KIND_FORMS = ("a greeting", "a warm letter", "a kind song", "a friendly note")

ILLNESSES = ("fever", "cough", "headache", "rash", "burn", "cold")
MEALS = ("sauce", "dough", "jam", "porridge", "pudding", "salad")
SWEETS = ("honey", "cocoa", "cinnamon", "yeast", "flour", "vanilla", "mustard", "syrup")

ADJECTIVES = (
    "responsible",
    "respectful",
    "wise",
    "careful",
    "honest",
    "safe",
    "kind",
    "thoughtful",
)

ONSETS = (
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "kr",
    "tr",
)
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("l", "n", "r", "s", "m", "x", "")
