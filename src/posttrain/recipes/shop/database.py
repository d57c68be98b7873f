"""The shop's database: customers, suppliers, products, orders and what is in them, as an SQLite file.

Numbers that people rank by (price, stock, credit, total) differ from row to row, so "the three dearest" has one answer.
Two seeds give two databases with the same vocabulary and different rows: a query that is right by accident on one is
caught by the other.
"""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

from posttrain.core import generator

SCHEMA = """\
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT, segment TEXT, joined INTEGER, credit INTEGER);
CREATE TABLE suppliers (id INTEGER PRIMARY KEY, name TEXT, country TEXT, rating INTEGER);
CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, category TEXT, price INTEGER, stock INTEGER,
  supplier_id INTEGER REFERENCES suppliers(id));
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customers(id), status TEXT, year INTEGER,
  total INTEGER);
CREATE TABLE order_items (order_id INTEGER REFERENCES orders(id), product_id INTEGER REFERENCES products(id),
  quantity INTEGER);
"""

CITIES = (
    "Paris London Berlin Madrid Rome Vienna Prague Oslo Dublin Lisbon Athens Warsaw Zurich Milan Lyon Porto "
    "Hamburg Ghent"
).split()
COUNTRIES = "Norway Spain Italy Japan Brazil Canada Kenya India Chile Poland Turkey Vietnam".split()
CATEGORIES = "kitchen garden office toys sports books music lighting bathroom travel pets tools".split()
SEGMENTS = "retail wholesale online partner".split()
STATUSES = "pending shipped delivered cancelled".split()
YEARS = tuple(range(2018, 2025))
RATINGS = tuple(range(1, 6))
ADJECTIVES = "Oak Steel Amber Silver Crimson Velvet Copper Ivory Cobalt Maple Marble Bamboo".split()
NOUNS = "Lamp Kettle Chair Basket Clock Ladder Mirror Bottle Shelf Radio Blanket Hammer".split()
FIRST_NAMES = "Anna Ben Clara David Emma Felix Grace Hugo Ida Jonas Karin Leo Mona Nils Olga Pavel Rosa Sven".split()
LAST_NAMES = "Berg Costa Dahl Evans Fischer Garcia Hansen Ivanov Jensen Keller Lopez Meyer Novak Olsen Petit".split()
SUPPLIER_WORDS = "Alpha Nordic Summit Harbor Sunrise Delta Falcon Granite Horizon Jade Lotus Pioneer Quartz".split()
SUPPLIER_KINDS = ("Goods", "Trading", "Works")

NUM_CUSTOMERS, NUM_ORDERS = 240, 1000


def build_database(path: Path, seed: int) -> Path:
    """Write the shop's database for one seed; an existing file is replaced.

    Args:
        path: where the SQLite file goes.
        seed: decides every row.

    Returns:
        `path`. About 3,900 rows in five tables.
    """
    draw = generator(seed, "shop database")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path)
    try:
        connection.executescript(SCHEMA)
        for table, rows in _rows(draw).items():
            marks = ", ".join("?" * len(rows[0]))
            connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
        connection.commit()
    finally:
        connection.close()
    return path


def product_names() -> list[str]:
    """Every name that a product may have."""
    return [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]


def _rows(draw: random.Random) -> dict[str, list[tuple[int | str, ...]]]:
    people = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    names = draw.sample(people, NUM_CUSTOMERS)
    credits = draw.sample(range(10, 1000), NUM_CUSTOMERS)
    customers: list[tuple[int | str, ...]] = [
        (i + 1, names[i], draw.choice(CITIES), draw.choice(SEGMENTS), draw.choice(YEARS), credits[i])
        for i in range(NUM_CUSTOMERS)
    ]
    supplier_names = [f"{word} {kind}" for word in SUPPLIER_WORDS for kind in SUPPLIER_KINDS]
    suppliers: list[tuple[int | str, ...]] = [
        (
            i + 1,
            name,
            COUNTRIES[i % len(COUNTRIES)] if i < len(COUNTRIES) else draw.choice(COUNTRIES),
            draw.choice(RATINGS),
        )
        for i, name in enumerate(draw.sample(supplier_names, len(supplier_names)))
    ]
    # All possible products exist in every shop, so that a question about one has an answer in both databases.
    titles = draw.sample(product_names(), len(product_names()))
    prices = draw.sample(range(5, 1000), len(titles))
    stocks = draw.sample(range(0, 600), len(titles))
    products: list[tuple[int | str, ...]] = [
        (i + 1, title, draw.choice(CATEGORIES), prices[i], stocks[i], draw.randint(1, len(suppliers)))
        for i, title in enumerate(titles)
    ]
    totals = draw.sample(range(20, 6000), NUM_ORDERS)
    orders: list[tuple[int | str, ...]] = [
        (i + 1, draw.randint(1, NUM_CUSTOMERS), draw.choice(STATUSES), draw.choice(YEARS), totals[i])
        for i in range(NUM_ORDERS)
    ]
    items: list[tuple[int | str, ...]] = [
        (order, product, draw.randint(1, 9))
        for order in range(1, NUM_ORDERS + 1)
        for product in draw.sample(range(1, len(products) + 1), draw.randint(1, 4))
    ]
    return {
        "customers": customers,
        "suppliers": suppliers,
        "products": products,
        "orders": orders,
        "order_items": items,
    }
