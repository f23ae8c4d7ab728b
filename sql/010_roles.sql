-- The four roles, each holding the rights of the one before. Roles belong to the whole server: another database
-- may have made them already, and vae_private.installation remembers which ones this one made.

do $$
declare
    names constant text[] := array['vae_reader', 'vae_scorer', 'vae_operator', 'vae_trainer'];
    position integer;
begin
    for position in 1 .. 4 loop
        if not exists (select from pg_catalog.pg_roles where rolname = names[position]) then
            execute format('create role %I nologin', names[position]);
            update vae_private.installation set created_roles = created_roles || names[position];
        end if;
        if position > 1 then
            if not pg_catalog.pg_has_role(names[position], names[position - 1], 'usage') then
                execute format('grant %I to %I', names[position - 1], names[position]);
            end if;
        end if;
    end loop;
end;
$$;
