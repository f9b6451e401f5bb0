"""Corpora to memorise, one per file; a configuration names their classes."""

from data_modules.base import MemorizationDataModule
from data_modules.biographies import Biographies
from data_modules.facts import Facts
from data_modules.linear_rule import LinearRule
from data_modules.natural_text import NaturalText
from data_modules.phonebook import PhoneBook
from data_modules.random_tokens import RandomTokens

__all__ = [
    "Biographies",
    "Facts",
    "LinearRule",
    "MemorizationDataModule",
    "NaturalText",
    "PhoneBook",
    "RandomTokens",
]
