"""Kinds of a column by its name, in several languages.

A name is split into words (`customerId`, `customer_id`, `Kunden-Nr.`). A word matches as a whole, or as the beginning
or end of a compound (`Kundennummer`, `Bestelldatum`). A name can have several kinds: `product_name` is both `item` and
`title`. Values count too (`guess.py`).
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KINDS: dict[str, tuple[str, ...]] = {
    "user": _words("""
        user customer cust client member buyer purchaser shopper visitor account reviewer subscriber consumer
        username login userid uid kunde kunden kdnr nutzer benutzer kaufer kaeufer besteller utilisateur acheteur
        adherent cliente usuario comprador utente acquirente utilizador klant gebruiker kund anvandare bruger bruker
        membre adherent miembro socio mitglied abonne lecteur lector asiakas klient uzytkownik
        zakaznik musteri kullanici пользовател клиент покупател 顧客 会員 会员 用户 客户 고객 회원
    """),
    "item": _words("""
        item product prod sku asin isbn ean upc gtin article artikel art produkt ware movie film book song track
        game app recipe hotel business restaurant anime course listing stockcode pid iid produit articulo producto
        prodotto articolo produto artigo vara vare tuote towar zbozi vyrobek urun buch livre libro livro товар
        продукт артикул 商品 品番 产品 상품 제품
    """),
    "order": _words("""
        order orderid transaction invoice basket receipt session purchase checkout line row index bestell bestellung
        auftrag rechnung beleg warenkorb zeile commande facture panier ligne pedido factura compra ordine fattura
        fatura bestelling zamowienie objednavka siparis заказ 注文 订单 주문
    """),
    "time": _words("""
        time timestamp date datetime datum zeit zeitpunkt uhrzeit tag day when created bought ts fecha hora jour
        heure data giorno dato tid pvm czas cas tarih moment momento instant instante epoch unix unixtime erstellt
        angelegt gekauft creado creada cree creato creata criado criada acquistato aangemaakt gekocht skapad oprettet
        opprettet luotu utworzono vytvoreno olusturulma создан дата время 日付 日時 日期 时间 날짜
    """),
    "other_time": _words("""
        shipped shipping delivery delivered updated modified changed aktualisiert geandert versendet actualizado
        modificado enviado modifie expedie aggiornato spedito atualizado bijgewerkt verzonden birth birthday dob expiry
        expires due paid payment return returned registered signup joined liefer lieferung versand geburt anderung
        faellig livraison naissance entrega nacimiento consegna nascita nascimento ship shipdate shipment zahldatum
        zahlung paiement pago pagamento etl load loaded import imported export exported sync synced ingested extracted
        snapshot processed refreshed
    """),
    "rating": _words("""
        rating rate stars star score overall grade sterne bewertung note etoiles puntuacion calificacion valoracion
        estrellas cijfer puntaje voto punteggio valutazione nota avaliacao beoordeling betyg ocena
        hodnoceni puan оценка рейтинг 評価
        评分 평점
    """),
    "quantity": _words("""
        quantity qty count units pieces num number menge anzahl stuck stueck quantite nombre cantidad unidades
        quantita quantidade aantal antal ilosc mnozstvi adet количество 数量 수량
    """),
    "price": _words("""
        price amount total cost revenue sum value discount tax vat currency preis betrag summe umsatz rabatt steuer
        waehrung prix montant remise precio importe prezzo importo preco valor prijs bedrag pris cena fiyat tutar
        цена сумма 価格 价格 가격
    """),
    "review": _words("""
        review comment text feedback body opinion kommentar rezension bewertungstext avis commentaire comentario
        resena recensione commento opinie yorum отзыв レビュー 评论 리뷰
    """),
    "title": _words("""
        title name titel bezeichnung benennung nom titre intitule libelle nombre titulo denominacion nome titolo
        denominazione naam namn navn nimi nazwa tytul nazev isim baslik название наименование 商品名
        タイトル 名称 标题 이름
    """),
    "description": _words("""
        description desc manufacturer details detail summary about features brand author artist director tags
        keywords material color colour beschreibung inhalt merkmale marke hersteller autor farbe schlagworte auteur
        marque couleur descripcion marca descrizione autore colore descricao cor omschrijving beskrivning opis popis
        aciklama описание бренд автор 説明 描述 品牌 설명
    """),
    "category": _words("""
        category categories genre genres department group class type section kategorie warengruppe gruppe sparte
        rubrik abteilung categorie rubrique rayon famille categoria genero departamento seccion reparto kategori
        kategoria tur категория カテゴリ 类别 분류
    """),
    "profile": _words("""
        age gender sex segment occupation job profession interests interest bio profile city region country state
        status tier loyalty alter altersgruppe geschlecht beruf interessen ort stadt land sexe metier ville pays
        interets edad genero ciudad pais intereses eta sesso citta paese idade cidade
    """),
    "personal": _words("""
        email mail phone mobile telephone tel telefon address street zip postcode plz adresse strasse firstname
        lastname surname vorname nachname prenom apellido cognome iban ip password birth birthday geburtsdatum
        telefono direccion indirizzo
    """),
    "id": _words("""
        id ids nr no number num key code uuid guid ref reference nummer kennung schluessel schlussel numero codigo
        clave codice chave clef cle hash 番号 编号 번호
    """),
}
"""Words of each kind, lower case and without accents."""
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"[^\W_]+")
_MIN_COMPOUND_LETTERS = 4
"""Least length of a word that may be a part of a compound."""
_ENDINGS = ("id", "nr", "no", "num", "key", "code")
_NO_COMPOUNDS = {"title", "count", "rate", "line", "data", "item", "ship", "load", "import", "export", "sync", "pago"}
"""Words that unrelated words begin or end with, as `country` does with `count`."""


def fold(text: str) -> str:
    """Convert to lower case without accents."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return unicodedata.normalize("NFKC", "".join(each for each in letters if not unicodedata.combining(each)))


@cache
def kinds_of(name: str) -> frozenset[str]:
    """Return the `KINDS` that a column name matches."""
    words = [fold(word) for part in _CAMEL.split(name) for word in _WORD.findall(part)]
    joined = "".join(words)
    words = list(dict.fromkeys([*words, joined]))
    return frozenset(
        kind for kind, keywords in KINDS.items() if any(_matches(word, each) for word in words for each in keywords)
    )


def _matches(word: str, keyword: str) -> bool:
    if word == keyword:
        return True
    if not keyword.isascii():
        return keyword in word
    if word.startswith(keyword) and word[len(keyword) :] in _ENDINGS:
        return True
    if len(keyword) < _MIN_COMPOUND_LETTERS or keyword in _NO_COMPOUNDS:
        return False
    return word.startswith(keyword) or word.endswith(keyword)
