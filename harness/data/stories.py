"""Seeded short tales with a plot: enough regularity that a model of a million weights learns something.

Each tale has a hero who wants something, an obstacle, a first try with the wrong means, a helper who knows the right
means and asks a favour for it, a journey counted in days, and an ending that follows from all that. The obstacle
decides which means works and the favour decides where it is found, so that a model that has read the beginning can
predict names, objects and outcomes.
"""

from __future__ import annotations

import re

from dyno.data.draw import Draw


def _table(text: str) -> list[list[str]]:
    """Rows of cells between bars; a bar at the end of a line carries the row on."""
    return [line.split(" | ") for line in text.strip().replace(" |\n  ", " | ").split("\n")]


PRONOUNS = {"she": ("her", "her"), "he": ("him", "his")}  # subject: (object, possessive)
# The subject pronoun, what they are, their names.
HEROES = _table("""
she | girl weaver sailor baker | Ada Mira Lena Tilda Rosa Ines
he | boy miller shepherd smith | Tom Anton Felix Otto Bram Ravi
""")
# A quest: the goal, the obstacle, the wrong means, how it fails, the right means, how it works.
QUESTS = _table("""
reach the market across the river | the bridge had fallen | to swim | the water was too cold |
  rope | tied the rope to an oak and swung across
open the blue door in the tower | it was locked | to push | the wood was too thick |
  key | put the key into the lock and turned it twice
walk through the long cave | it was dark inside | to feel along the wall | the floor was full of holes |
  lamp | lit the lamp and saw every hole
mend the old boat | there was a hole in it | to fill it with grass | the grass washed away |
  hammer | took the hammer and nailed a board over the hole
pick the golden apples | the branches were too high | to jump | the apples hung far above |
  ladder | set the ladder against the tree and climbed up
bring water to the dry garden | the well was deep | to use both hands | the water ran through the fingers |
  bucket | let the bucket down and drew up clear water
find the way home over the hills | the fog hid the path | to guess | every hill looked the same |
  compass | followed the needle of the compass to the north
bake bread for the feast | the oven was cold | to rub two stones | the stones were wet |
  match | struck the match and the fire burned brightly
sleep through the winter night | the wind blew through the hut | to close the curtains | the curtains were thin |
  blanket | lay down under the blanket and felt warm
write to the queen | the pen was broken | to write with a stick | the stick tore the paper |
  feather | dipped the feather in ink and wrote a long letter
""")
# A helper: who, where, the favour, where the favour is found.
HELPERS = _table("""
old fox | under a hedge | red berry | the hill of thorns
grey owl | in a hollow tree | silver coin | the empty mill
green frog | beside the pond | white shell | the stony beach
tired horse | at the gate | sweet carrot | the far field
small mouse | behind the barn | piece of cheese | the cellar of the inn
brown bear | near the waterfall | jar of honey | the hollow oak
black raven | on the church roof | shiny button | the tailor's shop
wise tortoise | on a flat stone | yellow flower | the southern meadow
""")
# A trait and its moral.
TRAITS = _table("""
patient | who waits well walks far
kind | a favour is never lost
curious | who asks will learn
honest | a kept word opens doors
brave | fear is smaller when you walk
""")
SIGHTS = (
    "passed a sleeping dog",
    "crossed a field of wheat",
    "heard bells far away",
    "met a man with a cart",
    "slept in a barn",
    "walked in the rain",
    "shared bread with a stranger",
    "counted the stars",
)
PLACES = (
    "a village by the sea",
    "a town in the mountains",
    "a house at the edge of the forest",
    "a valley of orchards",
    "a harbour full of ships",
    "a farm on the plain",
)
COUNTS = ("two", "three", "four", "five", "six")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")

# The plot: one line of alternatives a sentence, `{name}` is a fact of the tale.
PLOT: tuple[tuple[str, ...], ...] = (
    (
        "Once there was a {kind} called {name}, who lived in {place}.",
        "In {place} lived a {kind}. {Sub_} name was {name}.",
        "Long ago, in {place}, there lived a {trait} {kind} named {name}.",
    ),
    (
        "{name} wanted to {goal}, but {obstacle}.",
        "One morning {name} set out to {goal}. But {obstacle}.",
        "More than anything {name} wished to {goal}. There was one trouble: {obstacle}.",
    ),
    (
        "First {sub} tried {wrong}, but {fail}.",
        "{Sub} tried {wrong}. It did not help, because {fail}.",
        '"I will try {wrong}," said {name}. But {fail}.',
    ),
    ("{name} sat down and sighed.", "{Sub} did not know what to do.", "{Sub} almost gave up and went home."),
    ("{where_} sat {helper_a}.", "Then {sub} saw {helper_a} {where}.", "{where_} {sub} met {helper_a}."),
    (
        '"Why are you so sad?" asked the {helper}. "I want to {goal}," said {name}, "but {obstacle}."',
        '"What is wrong, {name}?" asked the {helper}. "I cannot {goal}," {sub} answered, "because {obstacle}."',
    ),
    (
        '"You need a {means}," said the {helper}. "I have one. Bring me a {favour} from {far}, and it is yours."',
        '"Only a {means} can help you," said the {helper}. "Bring me a {favour} from {far} and I will give you mine."',
    ),
    ("So {name} walked {count} days to {far}.", "{name} promised it, and the way to {far} took {count} days."),
    ("{journey}",),
    (
        "At {far} {sub} found the {favour} and carried it back to the {helper}.",
        "There, at {far}, lay the {favour}. {name} took it and went back to the {helper}.",
    ),
    (
        '"Here is your {favour}," said {name}. "And here is your {means}," said the {helper}.',
        "{name} gave the {favour} to the {helper}, and the {helper} gave {obj} the {means}.",
    ),
    ("Then {name} {works}.", "{name} thanked the {helper}, went back and {works}."),
    ("So {sub} could {goal} at last.", "And that is how {name} managed to {goal}."),
    (
        "{name} had been {trait}, and {moral}.",
        'Since then people in {place} say: "{Moral}."',
        "{Sub} and the {helper} stayed friends, for {moral}.",
    ),
)
_A = re.compile(r"\b([Aa]) (?=[aeio])")


def tale(draw: Draw) -> str:
    """One tale of 600 to 1,400 characters in a few paragraphs."""
    sub, kinds, names = draw.pick(HEROES)
    name, (obj, poss) = draw.pick(names.split()), PRONOUNS[sub]
    goal, obstacle, wrong, fail, means, works = draw.pick(QUESTS)
    helper, where, favour, far = draw.pick(HELPERS)
    trait, moral = draw.pick(TRAITS)
    days = draw.below(len(COUNTS))
    sights = draw.sample(SIGHTS, days + 2)
    journey = " ".join(f"On the {ORDINALS[day]} day {sub} {sight}." for day, sight in enumerate(sights))
    facts = {
        "name": name, "kind": draw.pick(kinds.split()),
        "sub": sub, "Sub": sub.capitalize(), "Sub_": poss.capitalize(), "obj": obj,
        "goal": goal, "obstacle": obstacle, "wrong": wrong, "fail": fail, "means": means, "works": works,
        "helper": helper, "helper_a": f"a {helper}", "where": where, "where_": where.capitalize(), "favour": favour,
        "far": far, "trait": trait, "moral": moral, "Moral": moral.capitalize(), "count": COUNTS[days],
        "journey": journey, "place": draw.pick(PLACES),
    }  # fmt: skip
    sentences = [draw.pick(choices).format_map(facts) for choices in PLOT]
    paragraphs = (sentences[:4], sentences[4:7], sentences[7:9], sentences[9:])
    return _A.sub(r"\1n ", "\n\n".join(" ".join(part) for part in paragraphs))
