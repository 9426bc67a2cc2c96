"""Other formats and the Hub: conversion, GGUF, model cards, uploads; the network that a run starts from."""
