"""Corpora to memorise, one a file; a configuration names their classes."""

from data_modules.base import MemorizationDataModule
from data_modules.phonebook import PhoneBook
from data_modules.random_tokens import RandomTokens

__all__ = ["MemorizationDataModule", "PhoneBook", "RandomTokens"]
