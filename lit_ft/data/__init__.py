"""Data: from rows anywhere to batches of token ids, without Lightning.

sources -> formats -> encoding -> examples (cached tables or streams) -> packing, batching, collate.
"""
