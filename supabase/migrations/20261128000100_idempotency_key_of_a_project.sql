-- An Idempotency-Key is its project's. While it was everybody's, whoever used a key that another tenant's backend would
-- derive (from a project's id, say) kept that tenant from ever making the session: with the key taken, all that could be
-- answered was a refusal.

alter table preview.sessions drop constraint sessions_idempotency_key_key;
alter table preview.sessions add constraint sessions_project_id_idempotency_key_key unique (project_id, idempotency_key);
