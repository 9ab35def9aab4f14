-- A shop's orders: 240 customers, 40 products, 3,000 orders. Everything is derived from row
-- numbers, so that every fresh database holds the same rows.

CREATE TABLE customers (
  id         INTEGER PRIMARY KEY,
  name       TEXT NOT NULL,
  email      TEXT NOT NULL UNIQUE,
  city       TEXT NOT NULL,
  created_at TEXT NOT NULL
) STRICT;

CREATE TABLE products (
  id          INTEGER PRIMARY KEY,
  sku         TEXT NOT NULL UNIQUE,
  name        TEXT NOT NULL,
  price_cents INTEGER NOT NULL CHECK (price_cents > 0)
) STRICT;

CREATE TABLE orders (
  id          INTEGER PRIMARY KEY,
  customer_id INTEGER NOT NULL REFERENCES customers (id),
  status      TEXT NOT NULL CHECK (status IN ('pending', 'paid', 'shipped', 'delivered', 'cancelled', 'returned')),
  ordered_at  TEXT NOT NULL,
  updated_at  TEXT NOT NULL,
  note        TEXT
) STRICT;

CREATE TABLE order_items (
  order_id    INTEGER NOT NULL REFERENCES orders (id),
  line        INTEGER NOT NULL,
  product_id  INTEGER NOT NULL REFERENCES products (id),
  quantity    INTEGER NOT NULL CHECK (quantity BETWEEN 1 AND 100),
  price_cents INTEGER NOT NULL,
  PRIMARY KEY (order_id, line)
) STRICT, WITHOUT ROWID;

-- Which status may follow which.
CREATE TABLE transitions (
  old TEXT NOT NULL,
  new TEXT NOT NULL,
  PRIMARY KEY (old, new)
) STRICT, WITHOUT ROWID;

INSERT INTO transitions (old, new) VALUES
  ('pending', 'paid'), ('pending', 'cancelled'), ('paid', 'shipped'), ('paid', 'cancelled'),
  ('shipped', 'delivered'), ('shipped', 'returned'), ('delivered', 'returned');

WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 239),
  first(i, name) AS (VALUES (0,'Ada'),(1,'Bruno'),(2,'Chiara'),(3,'Daniel'),(4,'Elif'),(5,'Farid'),(6,'Greta'),(7,'Hugo'),(8,'Ines'),(9,'Jonas'),(10,'Kira'),(11,'Luca'),(12,'Mina'),(13,'Noah'),(14,'Olga'),(15,'Pavel')),
  last(i, name) AS (VALUES (0,'Almeida'),(1,'Bauer'),(2,'Conti'),(3,'Dubois'),(4,'Eriksen'),(5,'Ferrari'),(6,'García'),(7,'Hansen'),(8,'Ivanova'),(9,'Jansen'),(10,'Kowalski'),(11,'Lindqvist'),(12,'Müller'),(13,'Novák'),(14,'O''Brien')),
  city(i, name) AS (VALUES (0,'Lisbon'),(1,'Vienna'),(2,'Milan'),(3,'Lyon'),(4,'Oslo'),(5,'Zürich'),(6,'Madrid'),(7,'Gdańsk'))
INSERT INTO customers (id, name, email, city, created_at)
SELECT i + 1,
  (SELECT name FROM first WHERE first.i = n.i % 16) || ' ' || (SELECT name FROM last WHERE last.i = n.i / 16),
  'customer' || (i + 1) || '@example.com',
  (SELECT name FROM city WHERE city.i = n.i * 5 % 8),
  strftime('%Y-%m-%dT%H:%M:%SZ', '2024-01-01', '+' || (i * 37 % 700) || ' hours')
FROM n;

WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 39),
  kind(i, name, price) AS (VALUES (0,'Desk lamp',3490),(1,'Office chair',18900),(2,'Notebook',450),(3,'Fountain pen',2790),(4,'Monitor arm',7990),(5,'Keyboard',8950),(6,'Headphones',12900),(7,'Backpack',6400)),
  variant(i, name) AS (VALUES (0,'black'),(1,'white'),(2,'green'),(3,'oak'),(4,'mini'))
INSERT INTO products (id, sku, name, price_cents)
SELECT i + 1, printf('SKU-%04d', 1000 + i * 7),
  (SELECT name FROM kind WHERE kind.i = n.i % 8) || ', ' || (SELECT name FROM variant WHERE variant.i = n.i / 8),
  (SELECT price FROM kind WHERE kind.i = n.i % 8) + (n.i / 8) * 110
FROM n;

WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 2999)
INSERT INTO orders (id, customer_id, status, ordered_at, updated_at, note)
SELECT 10000 + i,
  1 + (i * 7919) % 240,
  CASE WHEN i > 2900 THEN (CASE i % 3 WHEN 0 THEN 'pending' WHEN 1 THEN 'paid' ELSE 'shipped' END)
       ELSE (CASE (i * 31) % 20 WHEN 0 THEN 'cancelled' WHEN 1 THEN 'returned' WHEN 2 THEN 'shipped' WHEN 3 THEN 'paid' ELSE 'delivered' END) END,
  strftime('%Y-%m-%dT%H:%M:%SZ', '2025-01-01', '+' || (i * 313) || ' minutes'),
  strftime('%Y-%m-%dT%H:%M:%SZ', '2025-01-01', '+' || (i * 313 + (i * 17) % 4000) || ' minutes'),
  CASE WHEN i % 11 = 0 THEN 'Leave with the neighbour.' WHEN i % 29 = 0 THEN 'Gift: no invoice in the parcel.' END
FROM n;

WITH RECURSIVE line(l) AS (SELECT 1 UNION ALL SELECT l + 1 FROM line WHERE l < 4)
INSERT INTO order_items (order_id, line, product_id, quantity, price_cents)
SELECT o.id, l, p.id, 1 + (o.id * l) % 3, p.price_cents
FROM orders o, line JOIN products p ON p.id = 1 + (o.id * 13 + l * 17) % 40
WHERE l <= 1 + o.id % 4;

CREATE INDEX orders_by_time ON orders (ordered_at DESC, id DESC);
CREATE INDEX orders_by_customer ON orders (customer_id);
CREATE INDEX orders_by_status ON orders (status, ordered_at DESC, id DESC);

CREATE VIEW order_totals AS
SELECT order_id, sum(quantity * price_cents) AS total_cents, count(*) AS lines FROM order_items GROUP BY order_id;
