"""The way out: conversion to and from stock GPT-2."""
