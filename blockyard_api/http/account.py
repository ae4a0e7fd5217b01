"""Routes of the caller's own account: who he is, his tokens, and the very first one."""

from fastapi import APIRouter, Response

from blockyard_api.clock import rfc3339
from blockyard_api.http.models import Bootstrap, NewToken, PlainToken, TokenBody, TokenList, UserBody
from blockyard_api.http.refusals import OF_CALLERS, STORED, refusals
from blockyard_api.http.services import Caller, CallerFirst, ClientAddress, Provided
from blockyard_api.identity.tokens import DAY, Token

router = APIRouter(prefix="/api/v1", tags=["account"], route_class=CallerFirst)


def _fields(token: Token) -> dict[str, str | None]:
    return {
        "id": token.id,
        "name": token.name,
        "created_at": rfc3339(token.created_at),
        "expires_at": rfc3339(token.expires_at),
        "last_used_at": rfc3339(token.last_used_at),
    }


@router.post("/bootstrap", status_code=201, responses=refusals(400, 403, 410, 413, 429, *STORED))
async def bootstrap(given: Bootstrap, provided: Provided, client: ClientAddress) -> PlainToken:
    """Exchange the one-time token for an administrator's access token."""
    token, plain = await provided.tokens.bootstrap(given.token, client)
    return PlainToken.model_validate({**_fields(token), "token": plain})


@router.get("/users/me", responses=refusals(*OF_CALLERS))
async def me(principal: Caller) -> UserBody:
    """Return who the caller is."""
    return UserBody(sub=principal.sub, email=principal.email, name=principal.name, role=principal.role)


@router.post("/users/me/tokens", status_code=201, responses=refusals(400, 413, *OF_CALLERS))
async def create_token(new: NewToken, provided: Provided, principal: Caller) -> PlainToken:
    """Make a token; its plain text is shown this once."""
    token, plain = await provided.tokens.create(principal.sub, new.name, new.expires_in_days * DAY)
    return PlainToken.model_validate({**_fields(token), "token": plain})


@router.get("/users/me/tokens", responses=refusals(*OF_CALLERS))
async def list_tokens(provided: Provided, principal: Caller) -> TokenList:
    """Name the caller's tokens, newest first."""
    tokens = await provided.tokens.list(principal.sub)
    return TokenList(tokens=[TokenBody.model_validate(_fields(token)) for token in tokens])


@router.delete("/users/me/tokens", status_code=204, responses=refusals(*OF_CALLERS))
async def revoke_tokens(provided: Provided, principal: Caller) -> Response:
    """Revoke all of the caller's tokens, this one included."""
    await provided.tokens.revoke(principal.sub)
    return Response(status_code=204)


@router.delete("/users/me/tokens/{token_id}", status_code=204, responses=refusals(404, *OF_CALLERS))
async def revoke_token(token_id: str, provided: Provided, principal: Caller) -> Response:
    """Revoke one token; what it opened is closed."""
    await provided.tokens.revoke(principal.sub, token_id)
    return Response(status_code=204)
