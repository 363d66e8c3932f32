"""Data: rows from any source become batches of token ids, without Lightning.

sources -> formats -> encoding -> examples (cached tables or streams) -> packing, batching, collate.
"""
